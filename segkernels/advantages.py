"""Advantages: KL penalty, generalised advantage estimation, whitening."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from . import native
from .backend import choose
from .layout import (
    check_bools,
    check_coefficient,
    check_floats,
    check_like,
    constants,
    layout_of,
    number,
)
from .moments import all_reduce
from .normalizer import Normalizer
from .reference import advantages as reference
from .rewards import SPREADS, Reduction, Spread, check_credit, native_curve, packed_curve


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    gamma: float = 1.0,
    lam: float = 0.95,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation over the action tokens a_0 .. a_{m-1} of every row.

    With V_m = 0::

        delta_i = R_i + gamma V_{i+1} - V_i
        A_i = delta_i + gamma lam A_{i+1}
        return_i = A_i + V_i

    The scan steps over masked tokens: a hole neither discounts nor adds.

    Source: arXiv 1506.02438, equations 11 and 12.

    Args:
        rewards: R, float ``[N, T]``, or ``[T]`` with ``cu_seqlens``; the KL penalty included.
        values: V, float like ``rewards``; the value of the state before each token.
        mask: bool like ``rewards``, True at action tokens.
        cu_seqlens: int32 ``[N + 1]``, rows of a flat stream.
        gamma, lam: discount and trace decay, in [0, 1].
        backend: see ``segkernels.backend``.

    Returns:
        ``(advantages, returns)`` like ``rewards``, fp32 (fp64 when an input is fp64); 0 outside the
        mask. Not differentiable. A NaN reaches every earlier action token of its row, no other row.

    Raises:
        ValueError: shapes that disagree; gamma or lam outside [0, 1].
        TypeError: dtypes that disagree.
    """
    layout = layout_of("rewards", rewards, cu_seqlens)
    check_floats("rewards", rewards)
    _check_floats_like("values", values, rewards)
    check_bools("mask", mask, "rewards", rewards)
    _check_discounts(gamma, lam)
    rewards, values = constants(rewards, values)
    if choose("gae", rewards, values, backend=backend) == "reference":
        return reference.gae(rewards, values, mask, layout, gamma=gamma, lam=lam)
    return _gae_fwd(
        rewards.contiguous(),
        values.contiguous(),
        mask.contiguous(),
        layout.cu_seqlens,
        float(gamma),
        float(lam),
    )


def segment_advantages(
    rewards: Tensor,
    ends: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    normalizer: Normalizer | None = None,
    spread: Spread = "even",
    reduction: Reduction = "sum",
    clip: float = 10.0,
    kl_coef: float = 0.01,
    gamma: float = 1.0,
    lam: float = 0.95,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From segment rewards and log-probabilities to advantages, in one pass over the tokens.

    ::

        token_rewards = scatter_segment_rewards(rewards, ends, mask, ...)
        kl = logprobs - ref_logprobs
        advantages, returns = gae(token_rewards - kl_coef * kl, values, mask, ...)

    Source: arXiv 2501.02790, section 3; arXiv 1506.02438.

    Args:
        rewards, ends, normalizer, spread, reduction, clip: as in ``scatter_segment_rewards``.
        logprobs: nats, float like ``rewards``; of each token under the policy that sampled it.
        ref_logprobs: nats, float like ``rewards``; under the reference model.
        values: float like ``rewards``; the value of the state before each token.
        mask: bool like ``rewards``, True at action tokens.
        cu_seqlens: int32 ``[N + 1]``, rows of a flat stream.
        kl_coef: reward per nat, finite.
        gamma, lam: as in ``gae``.
        backend: see ``segkernels.backend``.

    Returns:
        ``(advantages, returns, token_rewards, kl)`` like ``rewards``, fp32 (fp64 when an input is
        fp64); 0 outside the mask. token_rewards are normalised, spread, reduced and clipped, but
        without the KL penalty; kl is per token, in nats, and may be negative. Their rows' sums are
        the score and the KL estimate of a response. Not differentiable.

    Raises:
        ValueError: shapes that disagree; an option out of range.
        TypeError: dtypes that disagree; a normalizer that is none.
        RuntimeError: a running normalizer that was never fitted.
    """
    layout = layout_of("rewards", rewards, cu_seqlens)
    check_floats("rewards", rewards)
    check_bools("ends", ends, "rewards", rewards)
    _check_floats_like("logprobs", logprobs, rewards)
    _check_floats_like("ref_logprobs", ref_logprobs, rewards)
    _check_floats_like("values", values, rewards)
    check_bools("mask", mask, "rewards", rewards)
    check_credit(normalizer, spread, reduction, clip)
    check_coefficient("kl_coef", kl_coef)
    _check_discounts(gamma, lam)
    rewards, logprobs, ref_logprobs, values = constants(rewards, logprobs, ref_logprobs, values)
    chosen = choose("segment_advantages", rewards, logprobs, ref_logprobs, values, backend=backend)
    if chosen == "reference":
        return reference.segment_advantages(
            rewards,
            ends,
            logprobs,
            ref_logprobs,
            values,
            mask,
            layout,
            normalizer=normalizer,
            spread=spread,
            reduction=reduction,
            clip=clip,
            kl_coef=kl_coef,
            gamma=gamma,
            lam=lam,
        )
    return _segment_advantages_fwd(
        rewards.contiguous(),
        ends.contiguous(),
        logprobs.contiguous(),
        ref_logprobs.contiguous(),
        values.contiguous(),
        mask.contiguous(),
        layout.cu_seqlens,
        packed_curve(normalizer),
        SPREADS.index(spread),
        reduction == "mean",
        float(clip),
        float(kl_coef),
        float(gamma),
        float(lam),
    )


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
    (x,) = constants(x)
    if choose("whiten", x, backend=backend) == "reference":
        moments = all_reduce(reference.moments(x, mask), group)
        return reference.whiten(x, mask, moments, center)
    x, mask = x.contiguous(), mask.contiguous()
    return _whiten_fwd(x, mask, all_reduce(_moments_fwd(x, mask), group), center)


def _check_floats_like(name: str, tensor: Tensor, rewards: Tensor) -> None:
    check_floats(name, tensor)
    check_like(name, tensor, "rewards", rewards)


def _check_discounts(gamma: float, lam: float) -> None:
    for name, value in (("gamma", gamma), ("lam", lam)):
        if not 0 <= number(name, value) <= 1:
            raise ValueError(
                f"{name}: expected a number in [0, 1], got {value}; 1.0 discounts nothing"
            )


@native.operator
def _gae_fwd(
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
        native.place(rewards),
    )
    return advantages, returns


@torch.library.register_fake(_gae_fwd)
def _(rewards, *_):
    return native.empty_like(rewards), native.empty_like(rewards)


@native.operator
def _segment_advantages_fwd(
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
        native_curve(curve),
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
        native.place(rewards),
    )
    return advantages, returns, token_rewards, kl


@torch.library.register_fake(_segment_advantages_fwd)
def _(rewards, *_):
    return tuple(native.empty_like(rewards) for _ in range(4))


@native.operator
def _moments_fwd(x: Tensor, mask: Tensor) -> Tensor:
    moments, scratch = native.empty(x, 3, dtype=torch.float64), native.scratch(x)
    native.kernels(x).moments_fwd(
        native.floats(x),
        native.ptr(mask),
        x.numel(),
        native.ptr(moments),
        native.ptr(scratch),
        native.place(x),
    )
    return moments


@torch.library.register_fake(_moments_fwd)
def _(x, mask):
    return native.empty(x, 3, dtype=torch.float64)


@native.operator
def _whiten_fwd(x: Tensor, mask: Tensor, moments: Tensor, center: bool) -> Tensor:
    out = native.empty_like(x)
    native.kernels(x).whiten_fwd(
        native.floats(x),
        native.ptr(mask),
        x.numel(),
        native.ptr(moments),
        center,
        native.ptr(out),
        native.place(x),
    )
    return out


@torch.library.register_fake(_whiten_fwd)
def _(x, mask, moments, center):
    return native.empty_like(x)
