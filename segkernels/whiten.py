"""Whitening of advantages over all action tokens of all ranks."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from .backend import choose
from .layout import check_bools, check_floats, constants
from .moments import all_reduce
from .native import whiten as native


def whiten(
    x: Tensor,
    mask: Tensor,
    *,
    center: bool = True,
    group: dist.ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor:
    """Gives x unit variance over all action tokens, of all ranks.

    (x - mean) / sqrt(max(variance, 1e-8)) with the population variance; ``center=False`` adds the
    mean back, so that only the scale changes. With torch.distributed initialised this is a
    collective: every rank of ``group`` calls it, and one all-reduce of count, mean and summed
    squared deviation makes the result that of one process holding all tokens.

    Args:
        x: float, any shape.
        mask: bool like ``x``, True at action tokens.
        center: whether the result has mean 0.
        group: the ranks that hold tokens; None is the default group.
        backend: see ``segkernels.backend``.

    Returns:
        like ``x``, fp32 (fp64 for fp64 x); 0 outside the mask, 0 everywhere without action tokens.
        A NaN or infinity at one action token reaches all of them. Not differentiable.

    Raises:
        ValueError: shapes that disagree.
        TypeError: dtypes that disagree.
    """
    check_floats("x", x)
    check_bools("mask", mask, "x", x)
    chosen = choose("whiten", x, backend=backend)
    (x,) = constants(x)
    if chosen == "reference":
        from .reference import whiten as reference

        moments = all_reduce(reference.moments(x, mask), group)
        return reference.whiten(x, mask, moments, center)
    x, mask = x.contiguous(), mask.contiguous()
    return native.whiten_fwd(x, mask, all_reduce(native.moments_fwd(x, mask), group), center)
