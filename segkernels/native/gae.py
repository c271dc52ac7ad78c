"""Generalised advantage estimation in the compiled extension."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native


@native.operator
def gae_fwd(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor | None,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    advantages, returns = native.empty_like(rewards), native.empty_like(rewards)
    native.kernels(rewards).gae_fwd(
        native.floats(rewards),
        native.floats(values),
        native.ptr(mask),
        native.rows(rewards, cu_seqlens),
        gamma,
        lam,
        native.ptr(advantages),
        native.ptr(returns),
        native.executor(rewards),
    )
    return advantages, returns


@torch.library.register_fake(gae_fwd)
def _(rewards, *_):
    return native.empty_like(rewards), native.empty_like(rewards)
