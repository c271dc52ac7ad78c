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
    ref = None if ref_logprobs is None else acts.take(ref_logprobs).to(dtype)
    terms = token_terms(new, old, weights, h, ref, clip, kl_coef, entropy_coef)
    loss = aggregate(terms, acts, aggregation)
    count = max(new.numel(), 1)
    clip_fraction = clipped(new, old, weights, clip).to(dtype).sum() / count
    return loss, clip_fraction, squared_log_ratio(new, old).sum() / count


def token_terms(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    entropy: Tensor,
    ref_logprobs: Tensor | None,
    clip: float,
    kl_coef: float,
    entropy_coef: float,
) -> Tensor:
    """What each token adds to the loss, elementwise."""
    terms = surrogate(logprobs, old_logprobs, advantages, clip)
    if kl_coef and ref_logprobs is not None:
        q = logprobs - ref_logprobs
        terms = terms + kl_coef * (torch.expm1(-q) + q)
    if entropy_coef:
        terms = terms - entropy_coef * entropy
    return terms


def clipped(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """Which tokens have the clipped form as the smaller one, and so no gradient from it."""
    low, high = log_ratio_bounds(clip)
    q = (logprobs - old_logprobs).detach()
    return ((advantages > 0) & (q > high)) | ((advantages < 0) & (q < low))


def squared_log_ratio(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """Half the square: its mean estimates the KL divergence of the two policies."""
    return 0.5 * (logprobs - old_logprobs).detach().square()
