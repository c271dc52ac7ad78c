"""Segment rewards to token rewards, plain PyTorch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..credit import Credit
from ..layout import Layout
from ._actions import Actions, accumulation_dtype, actions


@dataclass(frozen=True)
class Segments:
    """The S segments of a stream, in storage order."""

    is_end: Tensor  # [A] whether an action token ends a segment
    row: Tensor  # [S]
    k: Tensor  # [S] rank of each segment in its row
    in_row: Tensor  # [N] segments per row

    def positions(self, dtype: torch.dtype) -> Tensor:
        """[S] relative positions (k + 1) / K, in (0, 1]."""
        return (self.k + 1).to(dtype) / self.in_row[self.row].to(dtype)


def segments(ends: Tensor, acts: Actions) -> Segments:
    is_end = acts.take(ends)
    row = acts.row[is_end]
    in_row = torch.bincount(row, minlength=acts.layout.n_rows)
    first = in_row.cumsum(0) - in_row
    k = torch.arange(row.numel(), device=row.device) - first[row]
    return Segments(is_end, row, k, in_row)


def token_rewards(
    rewards: Tensor, ends: Tensor, acts: Actions, dtype: torch.dtype, credit: Credit
) -> Tensor:
    """[A] token rewards at the action tokens."""
    segs = segments(ends, acts)
    r = acts.take(rewards)[segs.is_end].to(dtype)  # [S]
    r = torch.where(r.isfinite(), r, math.nan)  # clipping would make infinity plausible
    if credit.normalizer is not None:
        r = credit.normalizer(r, segs.positions(dtype))

    # Segment of each action token; the tokens behind the last end of a row have none.
    first = segs.in_row.cumsum(0) - segs.in_row
    segment = segs.is_end.cumsum(0) - segs.is_end.long()  # [A]
    in_segment = segment - first[acts.row] < segs.in_row[acts.row]
    segment = segment[in_segment]

    if credit.spread == "even":
        r = r / torch.bincount(segment, minlength=r.numel()).to(dtype)
    if credit.reduction == "mean":
        r = r / segs.in_row[segs.row].to(dtype)
    out = r.new_zeros(in_segment.shape)
    if credit.spread == "last":
        out[segs.is_end] = r
    else:
        out[in_segment] = r[segment]
    return out.clamp(-credit.clip, credit.clip)


def scatter_segment_rewards(
    rewards: Tensor, ends: Tensor, mask: Tensor, layout: Layout, credit: Credit
) -> Tensor:
    acts = actions(mask, layout)
    return acts.put(token_rewards(rewards, ends, acts, accumulation_dtype(rewards), credit))
