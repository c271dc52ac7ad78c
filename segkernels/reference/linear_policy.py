"""The policy loss with its regularisers and diagnostics, from log-probabilities, plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from ..layout import Layout
from ..objective import clipped, squared_log_ratio, token_terms
from ._actions import accumulation_dtype, actions
from .ppo_loss import aggregate


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
