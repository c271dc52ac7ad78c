"""Normalisers of segment rewards: mean and std as functions of where a segment ends.

With K segments in a row, segment k has relative position p = (k + 1) / K, in (0, 1], and its reward
becomes (r - mean(p)) / std(p). Source: arXiv 2501.02790, section 3 (location-aware normalisers).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .layout import number

MAX_KNOTS = 64


@dataclass(frozen=True)
class Curve:
    """What every normaliser is to a kernel.

    mean(p) = mean_slope ln p + table(p; positions, means), std likewise and floored at min_std; the
    tables are linear between knots and constant beyond the ends. A log line has one knot, a table
    has no slope, a scalar has neither.
    """

    mean_slope: float
    std_slope: float
    min_std: float
    positions: tuple[float, ...]
    means: tuple[float, ...]
    stds: tuple[float, ...]
    # All of it for a kernel, [4 + 3 K] fp32 on the CPU: mean_slope, std_slope, min_std, K,
    # positions, means, stds. A tensor, because torch.compile compiles again for every new float.
    packed: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        packed = torch.tensor(self.numbers, dtype=torch.float32, device="cpu")
        object.__setattr__(self, "packed", packed)

    @property
    def numbers(self) -> tuple[float, ...]:
        """Those of ``packed``, as Python has them."""
        head = self.mean_slope, self.std_slope, self.min_std, len(self.positions)
        return *head, *self.positions, *self.means, *self.stds

    def mean(self, p: Tensor) -> Tensor:
        return self.mean_slope * p.log() + self._interpolate(p, self.means)

    def std(self, p: Tensor) -> Tensor:
        return (self.std_slope * p.log() + self._interpolate(p, self.stds)).clamp(min=self.min_std)

    def _interpolate(self, p: Tensor, heights: tuple[float, ...]) -> Tensor:
        y = p.new_tensor(heights)
        if len(heights) == 1:
            return y.expand_as(p)
        x = p.new_tensor(self.positions)
        right = torch.bucketize(p, x).clamp(1, len(heights) - 1)
        left = right - 1
        weight = ((p - x[left]) / (x[right] - x[left])).clamp(0, 1)
        return y[left] + weight * (y[right] - y[left])


class Normalizer:
    """r -> (r - mean(p)) / std(p), elementwise; std(p) is positive everywhere."""

    type: str
    _curve: Curve

    @property
    def curve(self) -> Curve:
        return self._curve

    def mean(self, p: Tensor) -> Tensor:
        """Expected reward of a segment at relative position p (floating tensor, in (0, 1])."""
        return self.curve.mean(p)

    def std(self, p: Tensor) -> Tensor:
        """Its standard deviation, floored at min_std."""
        return self.curve.std(p)

    def __call__(self, rewards: Tensor, positions: Tensor) -> Tensor:
        return (rewards - self.mean(positions)) / self.std(positions)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists for json; ``normalizer_from_dict`` reads it back."""
        raise NotImplementedError

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Normalizer) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        values = ", ".join(f"{k}={v!r}" for k, v in self.to_dict().items() if k != "type")
        return f"{type(self).__name__}({values})"


def _finite(owner: str, name: str, value: float) -> float:
    value = number(f"{owner}: {name}", value)
    if not math.isfinite(value):
        raise ValueError(
            f"{owner}: {name}: expected finite numbers, got {value}; fit the normaliser again on "
            "finite rewards"
        )
    return value


def _std_floor(owner: str, min_std: float | None, std: float, where: str) -> float:
    """min_std, or a tenth of ``std``; positive."""
    floor = std / 10 if min_std is None else number(f"{owner}: min_std", min_std)
    if not (floor > 0 and math.isfinite(floor)):
        got = f"{floor}" if min_std is not None else f"a tenth of {where} = {std}"
        raise ValueError(
            f"{owner}: min_std: expected a positive number, got {got}; pass min_std=, the smallest "
            "std that rewards may be divided by"
        )
    return floor


class LocationNormalizer(Normalizer):
    """Log lines: mean(p) = w_m ln p + b_m and std(p) = max(w_s ln p + b_s, min_std).

    min_std defaults to a tenth of b_s, which is the std at the last segment (p = 1). Raises
    ValueError for parameters that are not finite and for a min_std that is not positive.
    """

    type = "line"

    def __init__(
        self,
        mean_slope: float,
        mean_intercept: float,
        std_slope: float,
        std_intercept: float,
        min_std: float | None = None,
    ) -> None:
        owner = "LocationNormalizer"
        self.mean_slope = _finite(owner, "mean_slope", mean_slope)
        self.mean_intercept = _finite(owner, "mean_intercept", mean_intercept)
        self.std_slope = _finite(owner, "std_slope", std_slope)
        self.std_intercept = _finite(owner, "std_intercept", std_intercept)
        self.min_std = _std_floor(owner, min_std, self.std_intercept, "std_intercept")
        self._curve = Curve(
            self.mean_slope,
            self.std_slope,
            self.min_std,
            (1.0,),
            (self.mean_intercept,),
            (self.std_intercept,),
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "type": self.type,
            "mean_slope": self.mean_slope,
            "mean_intercept": self.mean_intercept,
            "std_slope": self.std_slope,
            "std_intercept": self.std_intercept,
            "min_std": self.min_std,
        }


class TableNormalizer(Normalizer):
    """Mean and std as tables over p: linear between knots, constant beyond the first and the last.

    positions: 1 to 64 strictly increasing numbers in (0, 1]; means and stds: as many. min_std
    defaults to a tenth of the std at the last knot. Raises ValueError where that is not so.
    """

    type = "table"

    def __init__(
        self,
        positions: Sequence[float],
        means: Sequence[float],
        stds: Sequence[float],
        min_std: float | None = None,
    ) -> None:
        owner = "TableNormalizer"
        x, self.means, self.stds = (
            tuple(_finite(owner, name, value) for value in values)
            for name, values in (("positions", positions), ("means", means), ("stds", stds))
        )
        for name, values in (("means", self.means), ("stds", self.stds)):
            if len(values) != len(x):
                raise ValueError(
                    f"{owner}: {name}: expected {len(x)} numbers like positions, got "
                    f"{len(values)}; give one mean and one std per knot"
                )
        if not 1 <= len(x) <= MAX_KNOTS:
            raise ValueError(
                f"{owner}: positions: expected 1 to {MAX_KNOTS} knots, got {len(x)}; merge "
                "neighbouring positions, as fit_location does"
            )
        rising = all(a < b for a, b in itertools.pairwise(x))
        if not (rising and x[0] > 0 and x[-1] <= 1):
            raise ValueError(
                f"{owner}: positions: expected strictly increasing numbers in (0, 1], got "
                f"{list(x)}; sort them and merge equal ones"
            )
        if min(self.stds) < 0:
            raise ValueError(
                f"{owner}: stds: expected no negative number, got {min(self.stds)}; pass standard "
                "deviations"
            )
        self.positions = x
        self.min_std = _std_floor(owner, min_std, self.stds[-1], "the last std")
        self._curve = Curve(0.0, 0.0, self.min_std, self.positions, self.means, self.stds)

    def to_dict(self) -> dict[str, Any]:
        return {
            "type": self.type,
            "positions": list(self.positions),
            "means": list(self.means),
            "stds": list(self.stds),
            "min_std": self.min_std,
        }


class ScalarNormalizer(Normalizer):
    """The same mean and std everywhere: the paper's baseline, and the form for bandit rewards.

    Raises ValueError for numbers that are not finite and for a std that is not positive.
    """

    type = "scalar"

    def __init__(self, mean: float, std: float) -> None:
        owner = "ScalarNormalizer"
        mean, std = _finite(owner, "mean", mean), _finite(owner, "std", std)
        if std <= 0:
            raise ValueError(
                f"{owner}: std: expected a positive number, got {std}; pass the standard deviation "
                "of the rewards"
            )
        self._curve = Curve(0.0, 0.0, std, (1.0,), (mean,), (std,))

    def to_dict(self) -> dict[str, Any]:
        return {"type": self.type, "mean": self._curve.means[0], "std": self._curve.stds[0]}
