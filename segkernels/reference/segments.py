"""Segment boundaries in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..boundaries import Boundaries
from ..layout import Layout, nan_entropy, values_may_be_checked
from ._actions import Actions, actions


def segment_ends(entropy: Tensor, mask: Tensor, layout: Layout, boundaries: Boundaries) -> Tensor:
    threshold, current, exclude_last, exclude_all = boundaries
    a = actions(mask, layout)
    h = a.take(entropy).float()  # [A]
    rank, count = a.rank, a.counts[a.row]
    decides = _decides(a, current)
    if values_may_be_checked(entropy):
        _check_numbers(h, a, decides)

    over = (h > torch.tensor(threshold, dtype=torch.float32, device=h.device)) & decides
    if current:
        over = torch.cat([over[1:], over.new_zeros(1)])[: over.numel()]
    left = count - 1 - rank
    excluded = (exclude_all if exclude_last is None else exclude_last[a.row]) & (count > 1)
    ends = torch.where(left == 0, ~excluded, over | ((left == 1) & excluded))
    return a.put(ends)


def check_numbers(entropy: Tensor, mask: Tensor, layout: Layout, current: bool) -> None:
    """Raises for the first NaN that could decide a boundary; synchronises a GPU."""
    a = actions(mask, layout)
    _check_numbers(a.take(entropy), a, _decides(a, current))


def _decides(a: Actions, current: bool) -> Tensor:
    """[A] whether the entropy of an action token decides a boundary."""
    return a.rank > 0 if current else torch.ones_like(a.rank, dtype=torch.bool)


def _check_numbers(h: Tensor, a: Actions, decides: Tensor) -> None:
    nan = (h.isnan() & decides).nonzero()
    if nan.numel():
        raise nan_entropy(a.layout, int(a.index[nan[0, 0]]))


def segment_offsets(ends: Tensor, mask: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    a = actions(mask, layout)
    end = a.take(ends).nonzero().squeeze(1)  # [S] as an index into [A]
    row = a.row[end]
    # A segment starts behind the previous end of its row, or at the row's first action token.
    previous = torch.cat([end.new_full((1,), -1), end])[: end.numel()]
    lengths = end + 1 - torch.maximum(previous + 1, a.starts[row])
    zero = end.new_zeros(1)
    per_row = torch.bincount(row, minlength=layout.n_rows)
    return torch.cat([zero, lengths.cumsum(0)]), torch.cat([zero, per_row.cumsum(0)])
