"""The policy loss with its regularisers and diagnostics, from log-probabilities, plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import Layout
from ._actions import accumulation_dtype, actions
from .ppo_loss import aggregate, log_ratio_bounds, surrogate


def policy_terms(
    logprobs: Tensor,
    entropy: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    ref_logprobs: Tensor | None,
    mask: Tensor,
    layout: Layout,
    *,
    clip: float,
    kl_coef: float,
    entropy_coef: float,
    aggregation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, clip_fraction, approx_kl)."""
    acts = actions(mask, layout)
    dtype = accumulation_dtype(logprobs, old_logprobs, advantages, ref_logprobs)
    new, h, old, weights = (
        acts.take(x).to(dtype) for x in (logprobs, entropy, old_logprobs, advantages)
    )
    terms = surrogate(new, old, weights, clip)
    if kl_coef and ref_logprobs is not None:
        q = new - acts.take(ref_logprobs).to(dtype)
        terms = terms + kl_coef * (torch.expm1(-q) + q)
    if entropy_coef:
        terms = terms - entropy_coef * h
    loss = aggregate(terms, acts, aggregation)

    q = (new - old).detach()
    low, high = log_ratio_bounds(clip)
    clipped = ((weights > 0) & (q > high)) | ((weights < 0) & (q < low))
    count = max(q.numel(), 1)
    return loss, clipped.to(dtype).sum() / count, 0.5 * q.square().sum() / count
