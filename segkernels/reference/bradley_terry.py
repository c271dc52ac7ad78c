"""Segment scores and the Bradley-Terry loss in plain PyTorch."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from ..layout import Layout
from ._actions import accumulation_dtype, actions


def segment_scores(
    rewards: Tensor, ends: Tensor, mask: Tensor | None, layout: Layout, mean: bool
) -> Tensor:
    if mask is not None:
        ends = ends & mask
    a = actions(ends, layout)
    read = a.take(rewards).to(accumulation_dtype(rewards))  # [S]
    sums = read.new_zeros(layout.n_rows).index_add(0, a.row, read)
    return sums / a.counts.clamp(min=1) if mean else sums


def segment_bradley_terry(
    rewards: Tensor,
    ends: Tensor,
    mask: Tensor | None,
    layout: Layout,
    mean: bool,
    margin: Tensor | None,
    label_smoothing: float,
    center_coef: float,
) -> tuple[Tensor, Tensor, Tensor]:
    scores = segment_scores(rewards, ends, mask, layout, mean)
    if margin is not None:
        scores = scores.to(accumulation_dtype(rewards, margin))
    chosen, rejected = scores.chunk(2)
    d = chosen - rejected
    if margin is not None:
        d = d - margin
    losses = -(1 - label_smoothing) * logsigmoid(d)
    # Terms of weight 0 are left out: 0 * inf is NaN.
    if label_smoothing:
        losses = losses - label_smoothing * logsigmoid(-d)
    if center_coef:
        losses = losses + center_coef * (chosen + rejected) ** 2
    # Divided first: the sum of finite losses may overflow.
    loss = (losses / losses.numel()).sum()
    return loss, scores, (chosen > rejected).to(scores.dtype).mean()
