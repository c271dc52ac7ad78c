"""What every reference op starts from: the action tokens of a stream, in order."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..layout import Layout


@dataclass(frozen=True)
class Actions:
    """The A action tokens of a stream; everything in storage order, so rows are contiguous."""

    layout: Layout
    index: Tensor  # [A] position in the flattened stream
    row: Tensor  # [A] row of each
    counts: Tensor  # [N] action tokens per row
    starts: Tensor  # [N] first action token of each row, as an index into [A]

    @property
    def rank(self) -> Tensor:
        """[A] position of each token among the action tokens of its row."""
        return torch.arange(self.index.numel(), device=self.index.device) - self.starts[self.row]

    def take(self, x: Tensor) -> Tensor:
        """[A] values of a stream-shaped tensor at the action tokens; differentiable."""
        return x.reshape(-1)[self.index]

    def put(self, values: Tensor) -> Tensor:
        """A stream-shaped tensor holding [A] values at the action tokens, 0 elsewhere."""
        flat = values.new_zeros(self.layout.n_tokens)
        return flat.index_put((self.index,), values).view(self.layout.shape)


def actions(mask: Tensor, layout: Layout) -> Actions:
    index = mask.reshape(-1).nonzero().squeeze(1)
    row = layout.row_ids(mask.device)[index]
    counts = torch.bincount(row, minlength=layout.n_rows)
    return Actions(layout, index, row, counts, counts.cumsum(0) - counts)


def accumulation_dtype(*tensors: Tensor | None) -> torch.dtype:
    """fp64 when any input is, else fp32."""
    double = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if double else torch.float32
