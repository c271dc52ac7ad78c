"""Rows of logits, as the four kernels over them take them; each backend has these kernels.

``forward`` takes whole rows. ``accumulate`` takes one slice of columns after another into states,
and ``finish`` turns those into the same numbers. ``backward`` gives the gradient of whole rows or
of a slice. They fill memory that the caller allocated, on the device of the logits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Rows of logits [..., V], or a slice of V columns of wider rows."""

    logits: Tensor  # [..., V], ``addressable``
    targets: Tensor | None  # [...] int64, columns of the wider rows
    temperature: float
    temperatures: Tensor | None = None  # [...] float32, in place of ``temperature``
    first: int = 0  # the column of the wider rows that the slice begins with

    @property
    def count(self) -> int:
        return self.logits.shape[:-1].numel()

    @property
    def strides(self) -> tuple[int, int, int]:
        """(inner, outer stride, inner stride): row r starts r // inner outer strides and
        r % inner inner strides, counted in elements, into the logits."""
        (_, outer), (inner, inner_stride) = [(1, 0), (1, 0), *_leading(self.logits)][-2:]
        return inner, outer, inner_stride


def _leading(logits: Tensor) -> list[tuple[int, int]]:
    """(size, stride) of the leading dimensions, as few as they can be merged into."""
    dims: list[tuple[int, int]] = []
    for size, stride in zip(logits.shape[:-1], logits.stride()[:-1], strict=True):
        if size == 1:
            continue
        if dims and dims[-1][1] == size * stride:
            dims[-1] = (dims[-1][0] * size, stride)
        else:
            dims.append((size, stride))
    return dims


def addressable(logits: Tensor) -> Tensor:
    """The logits, copied only where two strides and adjacent columns do not describe them."""
    adjacent = logits.stride(-1) == 1 or logits.shape[-1] == 1
    return logits if adjacent and len(_leading(logits)) <= 2 else logits.contiguous()


def row_stride(dlogits: Tensor) -> int:
    """Elements from one row of dlogits to the next; 0 if there is one row or none."""
    _, outer_stride, stride = Rows(dlogits, None, 1.0).strides
    if outer_stride:
        raise ValueError(
            f"dlogits: expected rows that are equally far apart, got strides {dlogits.stride()} of "
            f"shape {list(dlogits.shape)}; pass a contiguous tensor or columns of one"
        )
    return stride


def empty_states(logits: Tensor) -> Tensor:
    """[..., 4] what is known of rows before their first column."""
    states = torch.zeros(*logits.shape[:-1], 4, dtype=torch.float64, device=logits.device)
    states[..., 0] = -torch.inf
    states[..., 3] = torch.inf
    return states


def merged(states: Tensor, temperature: float | Tensor) -> Tensor:
    """[..., 4] of whole rows from those [shards, ..., 4] of their shards."""
    shard_max, sums, sum_exp_d, targets = states.unbind(-1)
    row_max = shard_max.amax(0)
    lower = (shard_max - row_max) / temperature
    factor = lower.exp()
    # A shard of -inf has nothing to measure from another maximum; 0 times -inf would be NaN.
    kept = lower.masked_fill(factor == 0, 0)
    target = targets.amin(0)
    return torch.stack(
        [
            row_max,
            (factor * sums).sum(0),
            (factor * (sum_exp_d + sums * kept)).sum(0),
            target.masked_fill(target == torch.inf, torch.nan),  # in no shard
        ],
        -1,
    )
