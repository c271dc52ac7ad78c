"""PPO losses, plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import Layout, each
from ..objective import clipped, squared_log_ratio, token_terms
from ._actions import Actions, accumulation_dtype, actions


def squared_error(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    """0.5 max of the squared errors of the value and of the value clipped around the old one."""
    clipped = values.clamp(old_values - clip, old_values + clip)
    counts = (values - returns).square() >= (clipped - returns).square()
    return 0.5 * (torch.where(counts, values, clipped) - returns).square()


def aggregate(terms: Tensor, acts: Actions, aggregation: str) -> Tensor:
    """A scalar from [A] terms; rows without action tokens do not count, none at all gives 0."""
    if aggregation == "token-mean":
        return terms.sum() / max(terms.numel(), 1)
    sums = terms.new_zeros(acts.layout.n_rows).index_add(0, acts.row, terms)  # [N]
    if aggregation == "seq-mean-token-mean":
        sums = sums / acts.counts.clamp(min=1)
    return sums.sum() / (acts.counts > 0).sum().clamp(min=1)


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    ref_logprobs: Tensor | None,
    entropy: Tensor | None,
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
    tensors = (logprobs, old_logprobs, advantages, ref_logprobs, entropy)
    dtype = accumulation_dtype(*tensors)
    new, old, weights, ref, h = each(lambda x: acts.take(x).to(dtype), *tensors)
    terms = token_terms(new, old, weights, h, ref, clip, kl_coef, entropy_coef)
    count = max(new.numel(), 1)
    clip_fraction = clipped(new, old, weights, clip).to(dtype).sum() / count
    approx_kl = squared_log_ratio(new, old).sum() / count
    return aggregate(terms, acts, aggregation), clip_fraction, approx_kl


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    layout: Layout,
    *,
    clip: float,
    aggregation: str,
) -> Tensor:
    acts = actions(mask, layout)
    dtype = accumulation_dtype(values, old_values, returns)
    new, old, targets = (acts.take(x).to(dtype) for x in (values, old_values, returns))
    return aggregate(squared_error(new, old, targets, clip), acts, aggregation)
