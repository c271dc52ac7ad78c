"""Where the entropies of a stream cut it into segments: the options of ``segment_ends``."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .layout import Layout, check_device, check_tensor, number

EntropyOf = Literal["next", "current"]


class Boundaries(NamedTuple):
    """The options, checked, as operators take them."""

    threshold: float
    current: bool  # entropy[t] is that of the distribution which produced t
    exclude_last: Tensor | None  # [N], or None for exclude_all in every row
    exclude_all: bool


def boundaries_of(
    entropy: Tensor,
    layout: Layout,
    threshold: float,
    entropy_of: EntropyOf,
    exclude_last: bool | Tensor,
) -> Boundaries:
    """Raises as ``segment_ends``, whose docstring defines the options."""
    threshold = number("threshold", threshold)
    if threshold != threshold:
        raise ValueError("threshold: expected nats or +-inf, got NaN; pass e.g. 1.75")
    if entropy_of not in ("next", "current"):
        raise ValueError(
            f"entropy_of: expected 'next' or 'current', got {entropy_of!r}; 'next' is the entropy "
            "of logits[t], 'current' that of the distribution which produced token t"
        )
    current = entropy_of == "current"
    if isinstance(exclude_last, bool):
        return Boundaries(threshold, current, None, exclude_last)
    _check_exclude_last(exclude_last, layout, entropy)
    return Boundaries(threshold, current, exclude_last.contiguous(), True)


def _check_exclude_last(exclude_last: Tensor, layout: Layout, entropy: Tensor) -> None:
    check_tensor("exclude_last", exclude_last)
    check_device("exclude_last", exclude_last, "entropy", entropy)
    if exclude_last.dtype != torch.bool:
        raise TypeError(
            f"exclude_last: expected bool, got {exclude_last.dtype}; pass exclude_last.bool()"
        )
    if exclude_last.shape != (layout.n_rows,):
        raise ValueError(
            f"exclude_last: expected shape [{layout.n_rows}], one per row, got "
            f"{list(exclude_last.shape)}; pass True, False or whether each row ends with EOS"
        )
