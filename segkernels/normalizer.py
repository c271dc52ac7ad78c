"""Normalisers of segment rewards: mean and std as functions of where a segment ends.

With K segments in a row, segment k has relative position p = (k + 1) / K, in (0, 1], and its reward
becomes (r - mean(p)) / std(p). Source: arXiv 2501.02790, section 3 (location-aware normalisers).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import moments, native
from .backend import choose
from .layout import check_bools, check_floats, check_like, constants, layout_of, number
from .reference._actions import actions
from .reference.rewards import segments

MAX_KNOTS = 64
POSITION_STEPS = 1000  # positions are rounded to 3 decimals before they are grouped
SEGMENTS_PER_KNOT = 32
UNFITTED = (
    "RunningLocationNormalizer: it was never fitted, so it has no mean and std to apply; call "
    "update(rewards, ends, mask) and then refit(), or fit one offline with 'segrlhf fit-normalizer'"
)


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
    # All of it for a kernel, [3 + 3 K] fp32 on the CPU: mean_slope, std_slope, min_std, positions,
    # means, stds. A tensor, because torch.compile compiles again for every new float.
    packed: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        lines = self.mean_slope, self.std_slope, self.min_std
        numbers = *lines, *self.positions, *self.means, *self.stds
        packed = torch.tensor(numbers, dtype=torch.float32, device="cpu")
        object.__setattr__(self, "packed", packed)

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


def segment_positions(ends: Tensor, mask: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
    """Relative position p = (k + 1) / K of every segment, in the order of ``rewards[ends & mask]``.

    ends, mask: bool ``[N, T]``, or ``[T]`` with cu_seqlens. Returns fp64 ``[S]``, in (0, 1]; rows
    without segments give nothing. Reads sizes on the host, so it synchronises a GPU.
    """
    layout = layout_of("ends", ends, cu_seqlens)
    check_bools("ends", ends, "ends", ends)
    check_bools("mask", mask, "ends", ends)
    return segments(ends, actions(mask, layout)).positions(torch.float64)


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
        spread = (weight * (x - x_mean).square()).sum()
        old = slope, intercept
        slope = (
            ((weight * (x - x_mean) * (y - y_mean)).sum() / spread).item() if spread > 0 else 0.0
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
    _check_epsilon(epsilon)
    check_like("rewards", rewards, "positions", positions)
    if positions.dim() != 1 or positions.numel() == 0:
        raise ValueError(
            f"positions: expected shape [segments] with one segment or more, got "
            f"{list(positions.shape)}; pass segment_positions(ends, mask) and rewards[ends]"
        )
    _check_finite_rewards(int((~rewards.isfinite()).sum()), rewards.numel())
    p = positions.detach().cpu().double()
    if not ((p > 0) & (p <= 1)).all():
        raise ValueError(
            f"positions: expected numbers in (0, 1], got {p.min().item()} to {p.max().item()}; "
            "pass segment_positions(ends, mask)"
        )
    return _fit(_by_position(p, rewards, POSITION_STEPS), epsilon, min_std)


def _check_epsilon(epsilon: float) -> None:
    if not 1 < number("epsilon", epsilon) < math.inf:
        raise ValueError(
            f"epsilon: expected a finite number over 1, got {epsilon}; 1.35 is Huber's choice"
        )


def _check_finite_rewards(not_finite: int, segments: int) -> None:
    if not_finite:
        raise ValueError(
            f"rewards: expected finite rewards at the ends of segments, got {not_finite} of "
            f"{segments} that are not; look at the reward model's outputs"
        )


def _by_position(p: Tensor, rewards: Tensor, bins: int) -> Tensor:
    """Moments ``[3, bins]`` of rewards by position rounded to a multiple of 1 / bins."""
    nearest = (p * bins).round().long().clamp(1, bins) - 1
    return moments.grouped(rewards.detach().cpu(), nearest, bins)


def _fit(by_position: Tensor, epsilon: float, min_std: float | None) -> LocationFit:
    # Half an observation: a bin that decay has emptied.
    seen = (by_position[0] >= 0.5).nonzero().squeeze(1)
    bins = by_position.shape[1]
    positions = (seen + 1).double() / bins
    count, mean, m2 = by_position[:, seen]
    std = (m2 / count).sqrt()
    log_p = positions.log()
    mean_slope, mean_intercept = huber_line(log_p, mean, epsilon)
    std_slope, std_intercept = huber_line(log_p, std, epsilon)
    return LocationFit(
        LocationNormalizer(mean_slope, mean_intercept, std_slope, std_intercept, min_std),
        _table(positions, count, mean, m2, min_std),
        _r2(mean, mean_slope * log_p + mean_intercept),
        _r2(std, std_slope * log_p + std_intercept),
        positions,
        mean,
        std,
        count,
    )


def _table(
    positions: Tensor, count: Tensor, mean: Tensor, m2: Tensor, min_std: float | None
) -> TableNormalizer:
    total = count.sum().item()
    n_knots = min(MAX_KNOTS, len(positions), max(1, int(total / SEGMENTS_PER_KNOT)))
    middle = count.cumsum(0) - count / 2
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


class RunningLocationNormalizer(Normalizer):
    """A location-aware normaliser that follows the rewards it is shown.

    Holds count, mean and M2 in fp64 for each of ``bins`` positions (p rounded to a multiple of
    1 / bins). ``update`` collects; ``all_reduce`` closes a batch: what all ranks saw is merged
    exactly and added to the past, whose counts are first multiplied by ``decay``; ``refit`` fits a
    line and a table as ``fit_location`` does and applies the better one from then on. Bins whose
    count has decayed below one half are left out. Applying it before a fit is a RuntimeError.

    Args:
        bins: 1 or more; 1000 rounds p to 3 decimals, as ``fit_location`` does.
        decay: in (0, 1], what one batch leaves of the past; 1 forgets nothing.
        epsilon, min_std: as in ``fit_location``.
    """

    type = "running"

    def __init__(
        self,
        bins: int = POSITION_STEPS,
        decay: float = 1.0,
        *,
        epsilon: float = 1.35,
        min_std: float | None = None,
    ) -> None:
        if not (isinstance(bins, int) and bins >= 1):
            raise ValueError(f"bins: expected 1 or more, got {bins!r}; 1000 is three decimals of p")
        _check_epsilon(epsilon)
        if not 0 < number("decay", decay) <= 1:
            raise ValueError(
                f"decay: expected a number in (0, 1], got {decay}; 1 keeps all of the past"
            )
        self.bins = bins
        self.decay = decay
        self.epsilon = epsilon
        self.min_std = min_std
        self._past = torch.zeros(3, bins, dtype=torch.float64, device="cpu")
        self._batch: Tensor | None = None  # of this rank, since the last all_reduce
        self._applied: Normalizer | None = None

    @property
    def curve(self) -> Curve:
        if self._applied is None:
            raise RuntimeError(UNFITTED)
        return self._applied.curve

    def update(
        self,
        rewards: Tensor,
        ends: Tensor,
        mask: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        backend: str | None = None,
    ) -> None:
        """Collects the rewards at the ends of segments; nothing else of ``rewards`` is read.

        rewards: floating ``[N, T]``, or ``[T]`` with cu_seqlens; ends and mask: bool, same shape.
        A batch without segments adds nothing. Raises ValueError for a reward that is not finite,
        and then has collected nothing. No communication. ``backend``: see ``segkernels.backend``.
        """
        layout = layout_of("rewards", rewards, cu_seqlens)
        check_floats("rewards", rewards)
        check_bools("ends", ends, "rewards", rewards)
        check_bools("mask", mask, "rewards", rewards)
        (rewards,) = constants(rewards)
        if choose("RunningLocationNormalizer", rewards, backend=backend) == "reference":
            at_ends = rewards[ends & mask]
            _check_finite_rewards(int((~at_ends.isfinite()).sum()), at_ends.numel())
            p = segments(ends, actions(mask, layout)).positions(torch.float64)
            new = _by_position(p.cpu(), at_ends, self.bins)
        else:
            new = _location_moments(
                *(rewards.contiguous(), ends.contiguous(), mask.contiguous()),
                layout.cu_seqlens,
                self.bins,
            )
        self._batch = new if self._batch is None else moments.merge(self._batch, new)

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Closes the batch on all ranks with one all-reduce; alone, without communication.

        A collective: every rank of ``group`` calls it, also one that saw no segment.
        """
        batch = torch.zeros_like(self._past) if self._batch is None else self._batch
        batch = moments.all_reduce(batch, group)
        if batch[0].any():
            keep = torch.tensor([self.decay, 1.0, self.decay], dtype=torch.float64, device="cpu")
            self._past = moments.merge(self._past * keep[:, None], batch)
        self._batch = None

    def refit(self, group: dist.ProcessGroup | None = None) -> LocationFit:
        """Fits to everything merged so far, applies the better form and returns both.

        Closes an open batch by ``all_reduce`` first. Raises RuntimeError when no segment was seen.
        """
        if self._batch is not None:
            self.all_reduce(group)
        if not (self._past[0] >= 0.5).any():
            raise RuntimeError(
                "RunningLocationNormalizer: no segment to fit to; call update(rewards, ends, mask) "
                "with a batch that has segments before refit()"
            )
        fit = _fit(self._past, self.epsilon, self.min_std)
        self._applied = fit.best
        return fit

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, exact: an open batch and the last fit included."""
        return {
            "bins": self.bins,
            "decay": self.decay,
            "epsilon": self.epsilon,
            "min_std": self.min_std,
            "past": _sparse(self._past),
            "batch": None if self._batch is None else _sparse(self._batch),
            "applied": None if self._applied is None else self._applied.to_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over everything from ``state_dict()``, options included."""
        self.__init__(  # type: ignore[misc]
            state["bins"], state["decay"], epsilon=state["epsilon"], min_std=state["min_std"]
        )
        self._past = _dense(state["past"], self.bins)
        self._batch = None if state["batch"] is None else _dense(state["batch"], self.bins)
        applied = state["applied"]
        self._applied = None if applied is None else normalizer_from_dict(applied)

    def to_dict(self) -> dict[str, Any]:
        return {"type": self.type, **self.state_dict()}


@native.operator
def _location_moments(
    rewards: Tensor, ends: Tensor, mask: Tensor, cu_seqlens: Tensor | None, bins: int
) -> Tensor:
    moments = native.empty(rewards, 3, bins, dtype=torch.float64)
    not_finite = native.kernels(rewards).location_moments(
        native.floats(rewards),
        native.ptr(ends),
        native.ptr(mask),
        native.rows(rewards, cu_seqlens),
        bins,
        native.ptr(moments),
        native.place(rewards),
    )
    _check_finite_rewards(not_finite, int((ends & mask).sum()) if not_finite else 0)
    return moments


@torch.library.register_fake(_location_moments)
def _(rewards, ends, mask, cu_seqlens, bins):
    return native.empty(rewards, 3, bins, dtype=torch.float64)


def _sparse(by_position: Tensor) -> dict[str, list]:
    seen = by_position[0].nonzero().squeeze(1)
    count, mean, m2 = by_position[:, seen].tolist()
    return {"bin": seen.tolist(), "count": count, "mean": mean, "m2": m2}


def _dense(columns: Mapping[str, list], bins: int) -> Tensor:
    out = torch.zeros(3, bins, dtype=torch.float64, device="cpu")
    values = [columns["count"], columns["mean"], columns["m2"]]
    out[:, torch.tensor(columns["bin"], dtype=torch.long, device="cpu")] = torch.tensor(
        values, dtype=torch.float64
    )
    return out


def normalizer_from_dict(values: Mapping[str, Any]) -> Normalizer:
    """The normaliser that ``to_dict`` wrote. Raises ValueError for what is none."""
    if not isinstance(values, Mapping):
        raise TypeError(
            f"normalizer: expected a dict, got {type(values).__name__}; pass what to_dict() gave"
        )
    options = dict(values)
    kind = options.pop("type", None)
    kinds = {cls.type: cls for cls in (LocationNormalizer, TableNormalizer, ScalarNormalizer)}
    if kind != RunningLocationNormalizer.type and kind not in list(kinds):
        raise ValueError(
            f"normalizer: expected type line, table, scalar or running, got {kind!r}; write the "
            "file with 'segrlhf fit-normalizer' or to_dict()"
        )
    try:
        if kind in kinds:
            return kinds[kind](**options)
        running = RunningLocationNormalizer()
        running.load_state_dict(options)
        return running
    except (TypeError, KeyError, IndexError) as error:
        raise ValueError(
            f"normalizer: expected the fields of type {kind}, got {sorted(options)} ({error}); "
            "write the file with 'segrlhf fit-normalizer' or to_dict()"
        ) from error
