"""How the rewards of segments become rewards of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from .layout import number
from .normalizer import Normalizer

Spread = Literal["even", "repeat", "last"]
Reduction = Literal["sum", "mean"]
SPREADS: tuple[str, ...] = get_args(Spread)  # in the order of segk::Spread
REDUCTIONS: tuple[str, ...] = get_args(Reduction)


@dataclass(frozen=True)
class Credit:
    """Options of ``scatter_segment_rewards``, whose docstring defines them; checked when made.

    Raises TypeError for a normalizer of another type, ValueError for the other fields.
    """

    normalizer: Normalizer | None
    spread: Spread
    reduction: Reduction
    clip: float

    def __post_init__(self) -> None:
        if self.normalizer is not None and not isinstance(self.normalizer, Normalizer):
            raise TypeError(
                "normalizer: expected a LocationNormalizer, TableNormalizer, ScalarNormalizer, "
                f"RunningLocationNormalizer or None, got {type(self.normalizer).__name__}; read "
                "one from a dict with normalizer_from_dict"
            )
        if self.spread not in SPREADS:
            raise ValueError(
                f"spread: expected one of {', '.join(SPREADS)}, got {self.spread!r}; "
                "'even' divides a segment's reward by its length"
            )
        if self.reduction not in REDUCTIONS:
            raise ValueError(
                f"reduction: expected 'sum' or 'mean', got {self.reduction!r}; 'mean' divides by "
                "the number of segments"
            )
        if not number("clip", self.clip) > 0:
            raise ValueError(
                f"clip: expected a positive number, got {self.clip}; pass math.inf to clip nothing"
            )
