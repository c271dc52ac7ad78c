"""Fits normalisers to segment rewards: a Huber line of ln p and a table of p."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import moments
from .layout import check_floats, check_like, number
from .normalizer import MAX_KNOTS, LocationNormalizer, TableNormalizer

POSITION_STEPS = 1000  # positions are rounded to 3 decimals before they are grouped
SEGMENTS_PER_KNOT = 32
NO_SEGMENT = (
    "RunningLocationNormalizer: no segment to fit to; call update(rewards, ends, mask) with a "
    "batch that has segments before refit()"
)
# Of segk::FittedForms in csrc/include/segk/normalizer_fit.h: how many numbers it has, and which
# outcomes.
FITTED, NO_SEGMENTS = 0, 1
FORMS_NUMBERS = 8 + 3 * MAX_KNOTS


def huber_line(x: Tensor, y: Tensor, epsilon: float = 1.35) -> tuple[float, float]:
    """Slope and intercept of a Huber regression of y ``[P]`` on x ``[P]`` with a free scale.

    Minimises sum_i s + s H((y_i - slope x_i - intercept) / s) over slope, intercept and s > 0,
    where H(z) = z^2 up to |z| = epsilon and 2 epsilon |z| - epsilon^2 beyond (P. Huber,
    E. Ronchetti, "Robust Statistics", 2009, chapter 7). A single distinct x gives slope 0.
    """
    x, y = x.double(), y.double()
    size = y.abs().max().item() or 1.0
    weight = torch.ones_like(y)
    slope, intercept = 0.0, 0.0
    for _ in range(2000):
        total = weight.sum()
        x_mean, y_mean = (weight * x).sum() / total, (weight * y).sum() / total
        variation = (weight * (x - x_mean).square()).sum()
        old = slope, intercept
        slope = (
            ((weight * (x - x_mean) * (y - y_mean)).sum() / variation).item()
            if variation > 0
            else 0.0
        )
        intercept = (y_mean - slope * x_mean).item()
        residual = (y - slope * x - intercept).abs()
        scale = max(_huber_scale(residual, epsilon), 1e-12 * size)
        weight = (epsilon * scale / residual.clamp(min=1e-300)).clamp(max=1)
        if max(abs(slope - old[0]), abs(intercept - old[1])) <= 1e-12 * size:
            break
    return slope, intercept


def _huber_scale(residual: Tensor, epsilon: float) -> float:
    """The scale s at which sum_i min((r_i / s)^2, epsilon^2) equals the number of residuals."""
    squares = residual.square().sort().values
    n = squares.numel()
    sums = squares.cumsum(0)
    outliers = n - torch.arange(1, n + 1, dtype=torch.float64, device="cpu")
    # The sum at s = r_i / epsilon, where r_i turns from outlier to inlier; it falls with s.
    at_turn = torch.where(squares > 0, sums / squares, math.inf) + outliers
    inliers = int((at_turn * epsilon**2 >= n).sum())
    return math.sqrt(sums[inliers - 1].item() / (n - (n - inliers) * epsilon**2))


@dataclass(frozen=True)
class LocationFit:
    """Both forms of a normaliser fitted to the same rewards, and what they were fitted to."""

    line: LocationNormalizer
    table: TableNormalizer
    r2_mean: float  # share of the variation of the means over p that the line explains
    r2_std: float  # and of the stds
    positions: Tensor  # [P] fp64, the distinct positions
    means: Tensor  # [P]
    stds: Tensor  # [P] population standard deviations
    counts: Tensor  # [P] segments at each position

    @property
    def best(self) -> LocationNormalizer | TableNormalizer:
        """The table where the line explains less than half of the means' variation."""
        return self.table if self.r2_mean < 0.5 else self.line


def fit_location(
    positions: Tensor, rewards: Tensor, epsilon: float = 1.35, *, min_std: float | None = None
) -> LocationFit:
    """Fits a line and a table to segment rewards.

    p is rounded to 3 decimals; the mean and the population std of each distinct p are regressed on
    ln p by ``huber_line``, every p weighing the same. The table merges neighbouring positions into
    at most 64 knots of about equally many segments, at least 32. R^2 is over the distinct p.
    A position that only one segment has counts with std 0, so fit to many responses.

    Source: arXiv 2501.02790, section 3 and appendix; the table is ours.

    Args:
        positions: float ``[S]``, the relative position of every segment (``segment_positions``).
        rewards: float ``[S]``, their rewards, chosen and rejected responses together.
        epsilon: where Huber's loss turns from square to linear, in units of the scale; over 1.
        min_std: floor of both normalisers; None gives each its default.

    Raises:
        ValueError: no segment; rewards that are not finite; positions outside (0, 1]; a fitted std
            at p = 1 that is not positive where min_std is not given.
        TypeError: tensors that are not floating.
    """
    check_floats("positions", positions)
    check_floats("rewards", rewards)
    check_epsilon(epsilon)
    check_like("rewards", rewards, "positions", positions)
    if positions.dim() != 1 or positions.numel() == 0:
        raise ValueError(
            f"positions: expected shape [segments] with one segment or more, got "
            f"{list(positions.shape)}; pass segment_positions(ends, mask) and rewards[ends]"
        )
    check_finite_rewards(int((~rewards.isfinite()).sum()), rewards.numel())
    p = positions.detach().cpu().double()
    if not ((p > 0) & (p <= 1)).all():
        raise ValueError(
            f"positions: expected numbers in (0, 1], got {p.min().item()} to {p.max().item()}; "
            "pass segment_positions(ends, mask)"
        )
    return fit_moments(binned_moments(p, rewards, POSITION_STEPS), epsilon, min_std)


def check_epsilon(epsilon: float) -> None:
    if not 1 < number("epsilon", epsilon) < math.inf:
        raise ValueError(
            f"epsilon: expected a finite number over 1, got {epsilon}; 1.35 is Huber's choice"
        )


def check_finite_rewards(not_finite: int, segments: int) -> None:
    if not_finite:
        raise ValueError(
            f"rewards: expected finite rewards at the ends of segments, got {not_finite} of "
            f"{segments} that are not; look at the reward model's outputs"
        )


def binned_moments(p: Tensor, rewards: Tensor, bins: int) -> Tensor:
    """Moments ``[3, bins]`` of rewards by position rounded to a multiple of 1 / bins."""
    nearest = (p * bins).round().long().clamp(1, bins) - 1
    return moments.grouped(rewards.detach().cpu(), nearest, bins)


def fit_moments(binned: Tensor, epsilon: float, min_std: float | None) -> LocationFit:
    """Both forms from moments ``[3, bins]``, bin i being that of position (i + 1) / bins.

    Raises RuntimeError where there is no segment.
    """
    positions, means, stds, counts, m2 = _seen(binned)
    if not len(positions):
        raise RuntimeError(NO_SEGMENT)
    log_p = positions.log()
    mean_slope, mean_intercept = huber_line(log_p, means, epsilon)
    std_slope, std_intercept = huber_line(log_p, stds, epsilon)
    return LocationFit(
        LocationNormalizer(mean_slope, mean_intercept, std_slope, std_intercept, min_std),
        _table(positions, counts, means, m2, min_std),
        _r2(means, mean_slope * log_p + mean_intercept),
        _r2(stds, std_slope * log_p + std_intercept),
        positions,
        means,
        stds,
        counts,
    )


def _seen(binned: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(positions, means, stds, counts, m2) of the bins with half an observation or more."""
    seen = (binned[0] >= 0.5).nonzero().squeeze(1)  # decay empties bins
    count, mean, m2 = binned[:, seen]
    return (seen + 1).double() / binned.shape[1], mean, (m2 / count).sqrt(), count, m2


class FitOnGPU(LocationFit):
    """A fit that is still on a GPU: its fields are read, or raise, when one is looked at.

    forms: ``[FORMS_NUMBERS]``, binned: ``[3, bins]``, what was fitted to; both fp64.
    """

    def __init__(self, forms: Tensor, binned: Tensor, min_std: float | None) -> None:
        vars(self).update(_unread=(forms, binned, min_std))

    def __getattr__(self, name: str) -> Any:
        if name not in LocationFit.__dataclass_fields__:
            raise AttributeError(f"{type(self).__name__} has no attribute {name}")
        forms, binned, min_std = self._unread
        positions, means, stds, counts, _ = _seen(binned.cpu())
        fit = LocationFit(*forms_of(forms, min_std), positions, means, stds, counts)
        vars(self).update(vars(fit))
        return vars(self)[name]


def forms_of(
    forms: Tensor, min_std: float | None
) -> tuple[LocationNormalizer, TableNormalizer, float, float]:
    """(line, table, r2_mean, r2_std) that a GPU has fitted; raises as ``fit_moments``."""
    outcome, mean_slope, mean_at_1, std_slope, std_at_1, *r2, n_knots = forms[:8].tolist()
    if outcome == NO_SEGMENTS:
        raise RuntimeError(NO_SEGMENT)
    positions, means, stds = forms[8:].view(3, MAX_KNOTS)[:, : int(n_knots)].tolist()
    return (
        LocationNormalizer(mean_slope, mean_at_1, std_slope, std_at_1, min_std),
        TableNormalizer(positions, means, stds, min_std),
        *r2,
    )


def _table(
    positions: Tensor, count: Tensor, mean: Tensor, m2: Tensor, min_std: float | None
) -> TableNormalizer:
    upto = count.cumsum(0)
    total = upto[-1].item()
    n_knots = min(MAX_KNOTS, len(positions), max(1, int(total / SEGMENTS_PER_KNOT)))
    middle = upto - count / 2
    knot = (middle * (n_knots / total)).long().clamp(max=n_knots - 1)
    knot = knot.unique(return_inverse=True)[1]  # a position with many segments skips knots
    # A rare position between two frequent ones joins the next knot: its own std may be zero.
    size = torch.bincount(knot, count)
    full = size >= size.max().clamp(max=SEGMENTS_PER_KNOT)
    knot = (full.cumsum(0) - full.long()).clamp(max=int(full.sum()) - 1)[knot]
    size = torch.bincount(knot, count)
    at = torch.bincount(knot, count * positions) / size
    means = torch.bincount(knot, count * mean) / size
    between = count * (mean - means[knot]).square()
    stds = (torch.bincount(knot, m2 + between) / size).sqrt()
    return TableNormalizer(at.clamp(max=1).tolist(), means.tolist(), stds.tolist(), min_std)


def _r2(y: Tensor, fitted: Tensor) -> float:
    total = (y - y.mean()).square().sum().item()
    if total <= 1e-20 * y.square().sum().item():
        return 1.0  # nothing varies, so nothing is left unexplained
    return 1 - (y - fitted).square().sum().item() / total
