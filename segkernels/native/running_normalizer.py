"""What a running normaliser collects, in the compiled extension."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..normalizer_fit import check_finite_rewards


@native.operator
def location_moments(
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
        native.executor(rewards),
    )
    check_finite_rewards(not_finite, int((ends & mask).sum()) if not_finite else 0)
    return moments


@torch.library.register_fake(location_moments)
def _(rewards, ends, mask, cu_seqlens, bins):
    return native.empty(rewards, 3, bins, dtype=torch.float64)
