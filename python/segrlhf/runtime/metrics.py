"""Metrics of a training step, collected over micro-batches and processes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from accelerate import Accelerator
from torch import Tensor

Mean = tuple[Tensor, Tensor | float]  # (sum, count): 0-d, so that parts of a batch can be added


class Metrics:
    """Named means and extremes, collected on the device: only ``reduce`` waits for it.

    A mean is a sum and a count, which add up over micro-batches and processes whatever their sizes;
    both are kept in fp64. Every process must collect the same names before ``reduce``: a process
    that has nothing to add collects a sum and a count of 0, or an infinity as extreme.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}  # [2]: sum and count
        self._maxima: dict[str, Tensor] = {}
        self._minima: dict[str, Tensor] = {}

    def mean(self, name: str, total: Tensor, count: Tensor | float) -> None:
        """Adds ``total`` and ``count`` (both 0-d) to the mean of that name."""
        total = total.detach().double()
        # Added on the device: copying a number there would wait for it.
        pair = torch.stack([total, torch.zeros_like(total) + count])
        self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def means(self, means: Mapping[str, Mean]) -> None:
        """``mean`` of many names."""
        for name, (total, count) in means.items():
            self.mean(name, total, count)

    def maximum(self, name: str, value: Tensor) -> None:
        """Keeps the largest ``value`` (0-d) of that name."""
        value = value.detach().double()
        seen = self._maxima.get(name)
        self._maxima[name] = value if seen is None else torch.maximum(seen, value)

    def minimum(self, name: str, value: Tensor) -> None:
        """Keeps the smallest ``value`` (0-d) of that name."""
        value = value.detach().double()
        seen = self._minima.get(name)
        self._minima[name] = value if seen is None else torch.minimum(seen, value)

    def reduce(self, accelerator: Accelerator) -> dict[str, float]:
        """The value of every name over all processes, from one exchange between them; starts anew.

        A mean over a count of 0 is NaN. Every process must call this, and gets the same numbers.
        """
        extremes = (*self._maxima.values(), *self._minima.values())
        found = [*self._sums.values(), *(x[None] for x in extremes)]
        if not found:
            return {}
        table = accelerator.gather(torch.cat(found)[None]).cpu()  # [processes, numbers]
        sums, maxima, minima = table.split(
            [2 * len(self._sums), len(self._maxima), len(self._minima)], dim=1
        )
        total, count = sums.sum(0).view(-1, 2).unbind(1)
        values = {
            **dict(zip(self._sums, (total / count).tolist(), strict=True)),
            **dict(zip(self._maxima, maxima.amax(0).tolist(), strict=True)),
            **dict(zip(self._minima, minima.amin(0).tolist(), strict=True)),
        }
        for collected in (self._sums, self._maxima, self._minima):
            collected.clear()
        return values
