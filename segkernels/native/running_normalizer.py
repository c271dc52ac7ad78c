"""What a running normaliser collects, and its fit on GPUs, in the compiled extension."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import native
from ..normalizer import CURVE_NUMBERS
from ..normalizer_fit import FORMS_NUMBERS, check_finite_rewards


@native.operator
def location_moments(
    rewards: Tensor, ends: Tensor, mask: Tensor, cu_seqlens: Tensor | None, bins: int
) -> tuple[Tensor, Tensor]:
    """Moments [3, bins], and int64 [2]: rewards that are not finite, of how many.

    If any is not, the moments are 0, and on CPUs it is an error.
    """
    kernels = native.kernels(rewards)
    rows = native.rows(rewards, cu_seqlens)
    moments = native.empty(rewards, 3, bins, dtype=torch.float64)
    not_finite = native.empty(rewards, 2, dtype=torch.int64)
    size = kernels.location_moments_scratch(rows, bins)
    scratch = native.empty(rewards, size, dtype=torch.uint8)
    kernels.location_moments(
        native.floats(rewards),
        native.ptr(ends),
        native.ptr(mask),
        rows,
        bins,
        native.ptr(moments),
        native.ptr(not_finite),
        native.ptr(scratch),
        native.executor(rewards),
    )
    if not native.on_gpu(rewards):
        check_finite_rewards(*not_finite.tolist())
    return moments, not_finite


@torch.library.register_fake(location_moments)
def _(rewards, ends, mask, cu_seqlens, bins):
    return (
        native.empty(rewards, 3, bins, dtype=torch.float64),
        native.empty(rewards, 2, dtype=torch.int64),
    )


@native.operator
def fit_location(moments: Tensor, epsilon: float, min_std: float | None) -> tuple[Tensor, Tensor]:
    """``fit_moments`` on a GPU: fp64 [FORMS_NUMBERS] for ``forms_of``, and [CURVE_NUMBERS], the
    ``Curve.numbers`` of the better form."""
    bins = moments.shape[1]
    forms = native.empty(moments, FORMS_NUMBERS, dtype=torch.float64)
    curve = native.empty(moments, CURVE_NUMBERS, dtype=torch.float64)
    scratch = native.empty(moments, 3 * bins, dtype=torch.float64)
    native.kernels(moments).fit_location(
        native.ptr(moments),
        bins,
        epsilon,
        math.nan if min_std is None else min_std,
        native.ptr(forms),
        native.ptr(curve),
        native.ptr(scratch),
        native.executor(moments),
    )
    return forms, curve


@torch.library.register_fake(fit_location)
def _(moments, *_):
    return (
        native.empty(moments, FORMS_NUMBERS, dtype=torch.float64),
        native.empty(moments, CURVE_NUMBERS, dtype=torch.float64),
    )
