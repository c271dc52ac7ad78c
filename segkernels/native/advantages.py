"""From segment rewards to advantages in the compiled extension."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from .rewards import curve_address
from .segments import check_numbers, raise_for_nan


def _empty_outputs(like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        native.empty_like(like),
        native.empty_like(like),
        native.empty_like(like),
        native.empty_like(like),
    )


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
    out = _empty_outputs(rewards)
    native.kernels(rewards).segment_advantages_fwd(
        native.floats(rewards),
        native.ptr(ends),
        native.floats(logprobs),
        native.floats(ref_logprobs),
        native.floats(values),
        native.ptr(mask),
        native.rows(rewards, cu_seqlens),
        (curve_address(curve), spread, mean, clip),
        kl_coef,
        (gamma, lam),
        tuple(map(native.ptr, out)),
        native.executor(rewards),
    )
    return out


@torch.library.register_fake(segment_advantages_fwd)
def _(rewards, *_):
    return _empty_outputs(rewards)


@native.operator
def segment_ends_and_advantages_fwd(
    entropy: Tensor,
    threshold: float,
    current: bool,
    exclude_last: Tensor | None,
    exclude_all: bool,
    rewards: Tensor,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_numbers(entropy, mask, cu_seqlens, current)
    ends = native.empty_like(mask, torch.bool)
    out = _empty_outputs(rewards)
    nan = native.kernels(entropy).segment_ends_and_advantages_fwd(
        native.floats(entropy),
        (threshold, current, native.ptr(exclude_last), exclude_all),
        native.floats(rewards),
        native.floats(logprobs),
        native.floats(ref_logprobs),
        native.floats(values),
        native.ptr(mask),
        native.rows(rewards, cu_seqlens),
        (curve_address(curve), spread, mean, clip),
        kl_coef,
        (gamma, lam),
        native.ptr(ends),
        tuple(map(native.ptr, out)),
        native.executor(entropy),
    )
    raise_for_nan(entropy, cu_seqlens, nan)
    return ends, *out


@torch.library.register_fake(segment_ends_and_advantages_fwd)
def _(entropy, threshold, current, exclude_last, exclude_all, rewards, *rest):
    mask = rest[3]
    return native.empty_like(mask, torch.bool), *_empty_outputs(rewards)
