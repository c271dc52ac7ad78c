"""Segment boundaries in the compiled extension."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..layout import layout_of, nan_entropy, values_may_be_checked


def check_numbers(entropy: Tensor, mask: Tensor, cu_seqlens: Tensor | None, current: bool) -> None:
    """When debugging on a GPU, looks for NaN before a kernel runs, which cannot raise."""
    if entropy.is_cuda and values_may_be_checked(entropy):
        from ..reference.segments import check_numbers

        check_numbers(entropy, mask, layout_of("entropy", entropy, cu_seqlens), current)


def raise_for_nan(entropy: Tensor, cu_seqlens: Tensor | None, token: int) -> None:
    """Raises for the token whose NaN a kernel has found; -1 when there is none."""
    if token >= 0:
        raise nan_entropy(layout_of("entropy", entropy, cu_seqlens), token)


@native.operator
def segment_ends_fwd(
    entropy: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor | None,
    threshold: float,
    current: bool,
    exclude_last: Tensor | None,
    exclude_all: bool,
) -> Tensor:
    check_numbers(entropy, mask, cu_seqlens, current)
    ends = native.empty_like(mask, torch.bool)
    nan = native.kernels(entropy).segment_ends(
        native.floats(entropy),
        native.ptr(mask),
        native.rows(entropy, cu_seqlens),
        (threshold, current, native.ptr(exclude_last), exclude_all),
        native.ptr(ends),
        native.executor(entropy),
    )
    raise_for_nan(entropy, cu_seqlens, nan)
    return ends


@torch.library.register_fake(segment_ends_fwd)
def _(entropy, mask, *_):
    return native.empty_like(mask, torch.bool)
