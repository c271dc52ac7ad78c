"""From segment rewards to advantages in the compiled extension."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from .rewards import curve_address


@native.operator
def segment_advantages_fwd(
    rewards: Tensor,
    ends: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor | None,
    curve: Tensor | None,
    spread: int,
    mean: bool,
    clip: float,
    kl_coef: float,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    advantages, returns = native.empty_like(rewards), native.empty_like(rewards)
    token_rewards, kl = native.empty_like(rewards), native.empty_like(rewards)
    native.kernels(rewards).segment_advantages_fwd(
        native.floats(rewards),
        native.ptr(ends),
        native.floats(logprobs),
        native.floats(ref_logprobs),
        native.floats(values),
        native.ptr(mask),
        native.rows(rewards, cu_seqlens),
        curve_address(curve),
        spread,
        mean,
        clip,
        kl_coef,
        gamma,
        lam,
        native.ptr(advantages),
        native.ptr(returns),
        native.ptr(token_rewards),
        native.ptr(kl),
        native.executor(rewards),
    )
    return advantages, returns, token_rewards, kl


@torch.library.register_fake(segment_advantages_fwd)
def _(rewards, *_):
    return tuple(native.empty_like(rewards) for _ in range(4))
