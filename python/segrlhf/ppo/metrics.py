"""Means over micro-batches and processes."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor


class Means:
    """Named means whose numerators and denominators add up over micro-batches and processes."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, name: str, total: Tensor, count: Tensor | float) -> None:
        # Added on the device: copying a number there would wait for it.
        pair = torch.stack([total.double(), torch.zeros_like(total, dtype=torch.float64) + count])
        self.sums[name] = self.sums.get(name, 0.0) + pair

    def reduce(self, accelerator: Accelerator) -> dict[str, float]:
        totals = accelerator.reduce(torch.stack(list(self.sums.values())), "sum")  # [names, 2]
        return dict(zip(self.sums, (totals[:, 0] / totals[:, 1]).tolist(), strict=True))
