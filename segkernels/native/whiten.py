"""Moments over action tokens, and whitening by them, in the compiled extension."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native


@native.operator
def moments_fwd(x: Tensor, mask: Tensor) -> Tensor:
    moments, scratch = native.empty(x, 3, dtype=torch.float64), native.scratch(x)
    native.kernels(x).moments_fwd(
        native.floats(x),
        native.ptr(mask),
        x.numel(),
        native.ptr(moments),
        native.ptr(scratch),
        native.executor(x),
    )
    return moments


@torch.library.register_fake(moments_fwd)
def _(x, mask):
    return native.empty(x, 3, dtype=torch.float64)


@native.operator
def whiten_fwd(x: Tensor, mask: Tensor, moments: Tensor, center: bool) -> Tensor:
    out = native.empty_like(x)
    native.kernels(x).whiten_fwd(
        native.floats(x),
        native.ptr(mask),
        x.numel(),
        native.ptr(moments),
        center,
        native.ptr(out),
        native.executor(x),
    )
    return out


@torch.library.register_fake(whiten_fwd)
def _(x, mask, moments, center):
    return native.empty_like(x)
