"""A normaliser that follows the rewards of a run, merged exactly across batches and ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import moments
from .backend import choose
from .layout import check_bools, check_floats, constants, layout_of, number
from .native import running_normalizer as native
from .normalizer import (
    Curve,
    LocationNormalizer,
    Normalizer,
    ScalarNormalizer,
    TableNormalizer,
)
from .normalizer_fit import POSITION_STEPS, LocationFit, check_epsilon, fit_moments

UNFITTED = (
    "RunningLocationNormalizer: it was never fitted, so it has no mean and std to apply; call "
    "update(rewards, ends, mask) and then refit(), or fit one offline with 'segrlhf fit-normalizer'"
)


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
        check_epsilon(epsilon)
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
        chosen = choose("RunningLocationNormalizer", rewards, backend=backend)
        (rewards,) = constants(rewards)
        streams = (rewards.contiguous(), ends.contiguous(), mask.contiguous(), layout.cu_seqlens)
        if chosen == "reference":
            from .reference import running_normalizer as reference

            new = reference.location_moments(*streams, self.bins)
        else:
            new = native.location_moments(*streams, self.bins)
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
        fit = fit_moments(self._past, self.epsilon, self.min_std)
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

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> RunningLocationNormalizer:
        """One that continues where ``state_dict()`` was taken."""
        restored = cls(
            state["bins"], state["decay"], epsilon=state["epsilon"], min_std=state["min_std"]
        )
        restored._past = _dense(state["past"], restored.bins)
        if state["batch"] is not None:
            restored._batch = _dense(state["batch"], restored.bins)
        if state["applied"] is not None:
            restored._applied = normalizer_from_dict(state["applied"])
        return restored

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over everything from ``state_dict()``, options included.

        What cannot be read raises, and leaves the normaliser as it was.
        """
        vars(self).update(vars(self.from_state_dict(state)))

    def to_dict(self) -> dict[str, Any]:
        return {"type": self.type, **self.state_dict()}


def _sparse(binned: Tensor) -> dict[str, list]:
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
