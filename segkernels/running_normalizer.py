"""A normaliser that follows the rewards of a run, merged exactly across batches and ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import moments
from . import native as kernels
from .backend import choose
from .layout import check_bools, check_floats, constants, layout_of, number
from .native import running_normalizer as native
from .normalizer import (
    CURVE_NUMBERS,
    Curve,
    LocationNormalizer,
    Normalizer,
    ScalarNormalizer,
    TableNormalizer,
    check_min_std,
)
from .normalizer_fit import (
    FITTED,
    FORMS_NUMBERS,
    POSITION_STEPS,
    FitOnGPU,
    LocationFit,
    check_epsilon,
    check_finite_rewards,
    fit_moments,
    forms_of,
)

UNFITTED = (
    "RunningLocationNormalizer: it was never fitted, so it has no mean and std to apply; call "
    "update(rewards, ends, mask) and then refit(), or fit one offline with 'segrlhf fit-normalizer'"
)


@dataclass
class _Applied:
    """The form that is applied, on a GPU: always in the same memory, for CUDA graphs."""

    curve: Tensor  # [CURVE_NUMBERS] fp64, its Curve.numbers; NaN before the first
    packed: Tensor  # the same in fp32, which kernels read
    not_finite: Tensor  # int64 [2]: rewards that were not finite, of how many; not yet reported
    failed: Tensor  # [FORMS_NUMBERS] fp64: a fit that could not be applied; not yet reported

    @classmethod
    def beside(cls, moments: Tensor, applied: Normalizer | None) -> _Applied:
        # One knot at NaN: what it is applied to becomes NaN.
        numbers = [math.nan] * 3 + [1.0] if applied is None else list(applied.curve.numbers)
        numbers += [math.nan if applied is None else 0.0] * (CURVE_NUMBERS - len(numbers))
        curve = kernels.empty(moments, CURVE_NUMBERS, dtype=torch.float64)
        curve.copy_(torch.tensor(numbers, dtype=torch.float64, device="cpu"))
        return cls(
            curve,
            kernels.empty(moments, CURVE_NUMBERS).copy_(curve),
            kernels.empty(moments, 2, dtype=torch.int64).zero_(),
            kernels.empty(moments, FORMS_NUMBERS, dtype=torch.float64).zero_(),
        )

    def copy_(self, other: _Applied) -> _Applied:
        for mine, its in zip(vars(self).values(), vars(other).values(), strict=True):
            mine.copy_(its)
        return self

    def refit(self, forms: Tensor, curve: Tensor) -> None:
        """Applies a fit from now on; one that cannot be applied is kept to be reported."""
        fitted = forms[0] == FITTED
        self.curve.copy_(torch.where(fitted, curve, self.curve))
        self.packed.copy_(self.curve)
        self.failed.copy_(torch.where(fitted, self.failed, forms))

    def normalizer(self) -> Normalizer | None:
        """Read from the GPU; None where no fit could be applied yet."""
        mean_slope, std_slope, min_std, n_knots, *heights = self.curve.tolist()
        if math.isnan(min_std):
            return None
        k = int(n_knots)
        positions, means, stds = heights[:k], heights[k : 2 * k], heights[2 * k : 3 * k]
        if positions == [1.0]:
            return LocationNormalizer(mean_slope, means[0], std_slope, stds[0], min_std)
        return TableNormalizer(positions, means, stds, min_std)


class RunningLocationNormalizer(Normalizer):
    """A location-aware normaliser that follows the rewards it is shown.

    Holds count, mean and M2 in fp64 for each of ``bins`` positions (p rounded to a multiple of
    1 / bins). ``update`` collects; ``all_reduce`` closes a batch: what all ranks saw is merged
    exactly and added to the past, whose counts are first multiplied by ``decay``; ``refit`` fits a
    line and a table as ``fit_location`` does and applies the better one from then on. Bins whose
    count has decayed below one half are left out. Applying it before a fit is a RuntimeError.

    With rewards on a GPU, and the CUDA kernels, everything stays there: from ``update`` to
    ``segment_advantages`` nothing waits for the host, and a CUDA graph can hold all of it (capture
    ``update`` together with the ``all_reduce`` or ``refit`` that closes its batch). What would be
    an error on the host is then reported by the next call that reads from the GPU: ``check``,
    ``state_dict``, ``curve``, ``mean`` and ``std``. Until a fit succeeds it makes rewards NaN.

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
        check_epsilon(epsilon)
        if not 0 < number("decay", decay) <= 1:
            raise ValueError(
                f"decay: expected a number in (0, 1], got {decay}; 1 keeps all of the past"
            )
        if min_std is not None:
            check_min_std("RunningLocationNormalizer", min_std)
        self.bins = bins
        self.decay = decay
        self.epsilon = epsilon
        self.min_std = min_std
        self._past = torch.zeros(3, bins, dtype=torch.float64, device="cpu")
        self._batch = torch.zeros_like(self._past)  # of this rank, since the last all_reduce
        self._open = False  # whether there was an update since then
        self._fitted = False
        self._applied: Normalizer | None = None
        self._on_gpu: _Applied | None = None  # in place of it, once there were rewards on a GPU

    @property
    def curve(self) -> Curve:
        applied = self._read_applied()
        if applied is None:
            raise RuntimeError(UNFITTED)
        return applied.curve

    def curve_on(self, device: torch.device) -> Tensor:
        if self._on_gpu is None or self._past.device != device:
            return super().curve_on(device)
        if not self._fitted:
            raise RuntimeError(UNFITTED)
        return self._on_gpu.packed

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
        A batch without segments adds nothing. Raises ValueError for a reward that is not finite
        (on a GPU ``check`` does), and then has collected nothing. No communication. ``backend``:
        see ``segkernels.backend``.
        """
        layout = layout_of("rewards", rewards, cu_seqlens)
        check_floats("rewards", rewards)
        check_bools("ends", ends, "rewards", rewards)
        check_bools("mask", mask, "rewards", rewards)
        chosen = choose("RunningLocationNormalizer", rewards, backend=backend)
        (rewards,) = constants(rewards)
        streams = (rewards.contiguous(), ends.contiguous(), mask.contiguous(), layout.cu_seqlens)
        if chosen == "reference":
            from .reference import running_normalizer as reference

            new = reference.location_moments(*streams, self.bins).to(self._past.device)
        else:
            new, not_finite = native.location_moments(*streams, self.bins)
            if kernels.on_gpu(new):
                self._move_beside(new).not_finite.add_(not_finite)
            new = new.to(self._past.device)
        self._batch.copy_(moments.merge(self._batch, new))
        self._open = True

    def _move_beside(self, new: Tensor) -> _Applied:
        """Takes the state to the GPU of new moments, where it stays."""
        if self._on_gpu is None or self._past.device != new.device:
            applied = self._read_applied()
            self._past, self._batch = self._past.to(new.device), self._batch.to(new.device)
            self._on_gpu, self._applied = _Applied.beside(new, applied), None
        return self._on_gpu

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Closes the batch on all ranks with one all-reduce; alone, without communication.

        A collective: every rank of ``group`` calls it, also one that saw no segment.
        """
        batch = moments.all_reduce(self._batch, group)
        count, mean, m2 = self._past
        merged = moments.merge(torch.stack([count * self.decay, mean, m2 * self.decay]), batch)
        self._past.copy_(torch.where(batch[0].any(), merged, self._past))
        self._batch.zero_()
        self._open = False

    def refit(self, group: dist.ProcessGroup | None = None) -> LocationFit:
        """Fits to everything merged so far, applies the better form and returns both.

        Closes an open batch by ``all_reduce`` first. Raises RuntimeError when no segment was seen,
        and ValueError as ``fit_location``. On a GPU the fit that is returned is read, or raises,
        when it is first looked at, and ``check`` raises too.
        """
        if self._open:
            self.all_reduce(group)
        if self._on_gpu is None:
            fit = fit_moments(self._past, self.epsilon, self.min_std)
            self._applied = fit.best
        else:
            forms, curve = native.fit_location(self._past, self.epsilon, self.min_std)
            self._on_gpu.refit(forms, curve)
            fit = FitOnGPU(forms, self._past.clone(), self.min_std)
        self._fitted = True
        return fit

    def check(self) -> None:
        """Raises what a GPU has found since the last check; waits for it. Nothing on the host.

        ValueError for rewards that were not finite (updates with them were left out), RuntimeError
        for a refit without segments, ValueError for one that ``fit_location`` would refuse (the fit
        before it stays applied). Each is raised once.
        """
        if self._on_gpu is None:
            return
        not_finite, segments = self._on_gpu.not_finite.tolist()
        failed = self._on_gpu.failed.clone()
        self._on_gpu.not_finite.zero_()
        if not not_finite:
            self._on_gpu.failed.zero_()
            if failed[0] != FITTED:
                forms_of(failed, self.min_std)
        check_finite_rewards(not_finite, segments)

    def _read_applied(self) -> Normalizer | None:
        if self._on_gpu is None:
            return self._applied
        self.check()
        return self._on_gpu.normalizer()

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, exact: an open batch and the last fit included.

        The same on every device. Raises as ``check``.
        """
        applied = self._read_applied()
        return {
            "bins": self.bins,
            "decay": self.decay,
            "epsilon": self.epsilon,
            "min_std": self.min_std,
            "past": _sparse(self._past),
            "batch": _sparse(self._batch) if self._open else None,
            "applied": None if applied is None else applied.to_dict(),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> RunningLocationNormalizer:
        """One that continues where ``state_dict()`` was taken, on the host."""
        restored = cls(
            state["bins"], state["decay"], epsilon=state["epsilon"], min_std=state["min_std"]
        )
        restored._past = _dense(state["past"], restored.bins)
        if state["batch"] is not None:
            restored._batch = _dense(state["batch"], restored.bins)
            restored._open = True
        if state["applied"] is not None:
            restored._applied = normalizer_from_dict(state["applied"])
            restored._fitted = True
        return restored

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over everything from ``state_dict()``, options included.

        What cannot be read raises, and leaves the normaliser as it was. One on a GPU stays there,
        and as long as ``bins`` stays the same, in the same memory: CUDA graphs go on with it.
        """
        restored = self.from_state_dict(state)
        if self._on_gpu is not None:
            restored._on_gpu = self._on_gpu.copy_(restored._move_beside(self._past))
            if restored.bins == self.bins:
                restored._past = self._past.copy_(restored._past)
                restored._batch = self._batch.copy_(restored._batch)
        vars(self).update(vars(restored))

    def to_dict(self) -> dict[str, Any]:
        return {"type": self.type, **self.state_dict()}


def _sparse(binned: Tensor) -> dict[str, list]:
    binned = binned.cpu()
    seen = binned[0].nonzero().squeeze(1)
    count, mean, m2 = binned[:, seen].tolist()
    return {"bin": seen.tolist(), "count": count, "mean": mean, "m2": m2}


def _dense(columns: Mapping[str, list], bins: int) -> Tensor:
    out = torch.zeros(3, bins, dtype=torch.float64, device="cpu")
    values = [columns["count"], columns["mean"], columns["m2"]]
    out[:, torch.tensor(columns["bin"], dtype=torch.long, device="cpu")] = torch.tensor(
        values, dtype=torch.float64
    )
    return out


def normalizer_from_dict(values: Mapping[str, Any]) -> Normalizer:
    """The normaliser that ``to_dict`` wrote. Raises ValueError for a dict that it did not write."""
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
        return RunningLocationNormalizer.from_state_dict(options)
    except (TypeError, KeyError, IndexError) as error:
        raise ValueError(
            f"normalizer: expected the fields of type {kind}, got {sorted(options)} ({error}); "
            "write the file with 'segrlhf fit-normalizer' or to_dict()"
        ) from error
