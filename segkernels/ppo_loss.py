"""PPO's policy and value losses."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from . import native
from .backend import choose
from .layout import Layout, check_bools, check_floats, check_like, constants, layout_of, number
from .objective import log_ratio_bounds

Aggregation = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"]
AGGREGATIONS: tuple[str, ...] = get_args(Aggregation)  # in the order of segk::Aggregation


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    clip: float = 0.2,
    aggregation: Aggregation = "token-mean",
    backend: str | None = None,
) -> Tensor:
    """The clipped surrogate of PPO.

    With rho = exp(logprobs - old_logprobs) the term of an action token is::

        -min(rho A, clip(rho, 1 - clip, 1 + clip) A)

    Its gradient in logprobs is -rho A, or 0 where the clipped form is the smaller one.
    ``aggregation``: "token-mean" is the mean over all action tokens; "seq-mean-token-mean" the mean
    over rows of each row's mean; "seq-mean-token-sum" the mean over rows of each row's sum. Rows
    without an action token are not counted; without any the loss is 0 with zero gradient.

    Source: arXiv 1707.06347, equation 7; arXiv 2501.02790 aggregates by seq-mean-token-mean.

    Args:
        logprobs: nats, float ``[N, T]``, or ``[T]`` with ``cu_seqlens``; of each token under the
            policy in training.
        old_logprobs: nats, float like ``logprobs``; under the policy that sampled it. A constant.
        advantages: float like ``logprobs``. A constant.
        mask: bool like ``logprobs``, True at action tokens.
        cu_seqlens: int32 ``[N + 1]``, rows of a flat stream.
        clip: positive; ``math.inf`` clips nothing.
        aggregation: see above.
        backend: see ``segkernels.backend``.

    Returns:
        ``[]``, fp32 (fp64 when an input is fp64), differentiable in ``logprobs``. NaN when an input
        is NaN at an action token.

    Raises:
        ValueError: shapes that disagree; an unknown aggregation; a clip that is not positive.
        TypeError: dtypes that disagree.
    """
    layout = _check(
        ("logprobs", logprobs),
        ("old_logprobs", old_logprobs),
        ("advantages", advantages),
        mask,
        cu_seqlens,
        clip,
        aggregation,
    )
    old_logprobs, advantages = constants(old_logprobs, advantages)
    if choose("policy_loss", logprobs, old_logprobs, advantages, backend=backend) == "reference":
        from .reference import ppo_loss as reference

        return reference.policy_loss(
            logprobs, old_logprobs, advantages, mask, layout, clip=clip, aggregation=aggregation
        )
    loss, _ = _policy_loss_fwd(
        logprobs.contiguous(),
        old_logprobs.contiguous(),
        advantages.contiguous(),
        mask.contiguous(),
        layout.cu_seqlens,
        *log_ratio_bounds(clip),
        AGGREGATIONS.index(aggregation),
    )
    return loss


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    clip: float = 0.2,
    aggregation: Aggregation = "token-mean",
    backend: str | None = None,
) -> Tensor:
    """The clipped value loss of PPO.

    With V' = clip(V, V_old - clip, V_old + clip) the term of an action token is::

        0.5 max((V - R)^2, (V' - R)^2)

    Its gradient in V is V - R, or 0 where the clipped form is the larger one. ``aggregation`` and
    rows without action tokens as in ``policy_loss``.

    Source: the value clipping of OpenAI baselines' PPO2, as in TRL and verl.

    Args:
        values: V, float ``[N, T]``, or ``[T]`` with ``cu_seqlens``.
        old_values: V_old, float like ``values``; at the time of the rollout. A constant.
        returns: R, float like ``values``. A constant.
        mask: bool like ``values``, True at action tokens.
        cu_seqlens: int32 ``[N + 1]``, rows of a flat stream.
        clip: positive; ``math.inf`` clips nothing.
        aggregation: see ``policy_loss``.
        backend: see ``segkernels.backend``.

    Returns:
        ``[]``, fp32 (fp64 when an input is fp64), differentiable in ``values``. NaN when an input
        is NaN at an action token.

    Raises:
        ValueError: shapes that disagree; an unknown aggregation; a clip that is not positive.
        TypeError: dtypes that disagree.
    """
    layout = _check(
        ("values", values),
        ("old_values", old_values),
        ("returns", returns),
        mask,
        cu_seqlens,
        clip,
        aggregation,
    )
    old_values, returns = constants(old_values, returns)
    if choose("value_loss", values, old_values, returns, backend=backend) == "reference":
        from .reference import ppo_loss as reference

        return reference.value_loss(
            values, old_values, returns, mask, layout, clip=clip, aggregation=aggregation
        )
    loss, _ = _value_loss_fwd(
        values.contiguous(),
        old_values.contiguous(),
        returns.contiguous(),
        mask.contiguous(),
        layout.cu_seqlens,
        float(clip),
        AGGREGATIONS.index(aggregation),
    )
    return loss


def check_aggregation(aggregation: str) -> None:
    if aggregation not in AGGREGATIONS:
        raise ValueError(
            f"aggregation: expected one of {', '.join(AGGREGATIONS)}, got {aggregation!r}; "
            "'token-mean' weighs every action token the same"
        )


def check_clip(clip: float) -> None:
    if not number("clip", clip) > 0:
        raise ValueError(
            f"clip: expected a positive number, got {clip}; pass math.inf to clip nothing"
        )


def _check(
    new: tuple[str, Tensor],
    old: tuple[str, Tensor],
    target: tuple[str, Tensor],
    mask: Tensor,
    cu_seqlens: Tensor | None,
    clip: float,
    aggregation: str,
) -> Layout:
    layout = layout_of(*new, cu_seqlens)
    check_floats(*new)
    for name, tensor in (old, target):
        check_floats(name, tensor)
        check_like(name, tensor, *new)
    check_bools("mask", mask, *new)
    check_clip(clip)
    check_aggregation(aggregation)
    return layout


@native.operator
def _policy_loss_fwd(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor | None,
    low: float,
    high: float,
    aggregation: int,
) -> tuple[Tensor, Tensor]:
    rows = native.rows(logprobs, cu_seqlens)
    loss, row_weights = (
        native.empty(logprobs),
        native.empty(logprobs, rows[0], dtype=torch.float64),
    )
    scratch = native.scratch(logprobs)
    native.kernels(logprobs).policy_loss_fwd(
        native.floats(logprobs),
        native.floats(old_logprobs),
        native.floats(advantages),
        native.ptr(mask),
        rows,
        low,
        high,
        aggregation,
        native.ptr(loss),
        native.ptr(row_weights),
        native.ptr(scratch),
        native.executor(logprobs),
    )
    return loss, row_weights


@native.operator
def _policy_loss_bwd(
    dloss: Tensor,
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor | None,
    low: float,
    high: float,
    row_weights: Tensor,
) -> Tensor:
    dlogprobs = native.empty_like(logprobs)
    native.kernels(dloss).policy_loss_bwd(
        native.ptr(dloss),
        native.floats(logprobs),
        native.floats(old_logprobs),
        native.floats(advantages),
        native.ptr(mask),
        native.rows(logprobs, cu_seqlens),
        low,
        high,
        native.ptr(row_weights),
        native.ptr(dlogprobs),
        native.executor(dloss),
    )
    return dlogprobs


@native.operator
def _value_loss_fwd(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor | None,
    clip: float,
    aggregation: int,
) -> tuple[Tensor, Tensor]:
    rows = native.rows(values, cu_seqlens)
    loss, row_weights = (
        native.empty(values),
        native.empty(values, rows[0], dtype=torch.float64),
    )
    scratch = native.scratch(values)
    native.kernels(values).value_loss_fwd(
        native.floats(values),
        native.floats(old_values),
        native.floats(returns),
        native.ptr(mask),
        rows,
        clip,
        aggregation,
        native.ptr(loss),
        native.ptr(row_weights),
        native.ptr(scratch),
        native.executor(values),
    )
    return loss, row_weights


@native.operator
def _value_loss_bwd(
    dloss: Tensor,
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor | None,
    clip: float,
    row_weights: Tensor,
) -> Tensor:
    dvalues = native.empty_like(values)
    native.kernels(dloss).value_loss_bwd(
        native.ptr(dloss),
        native.floats(values),
        native.floats(old_values),
        native.floats(returns),
        native.ptr(mask),
        native.rows(values, cu_seqlens),
        clip,
        native.ptr(row_weights),
        native.ptr(dvalues),
        native.executor(dloss),
    )
    return dvalues


def _loss_fake(new, old, target, mask, cu_seqlens, *options):
    n_rows = new.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return native.empty(new), native.empty(new, n_rows, dtype=torch.float64)


def _slope_fake(dloss, new, *rest):
    return native.empty_like(new)


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:5], output[1])
    ctx.options = inputs[5:-1]  # without the aggregation, which row_weights express


def _policy_loss_backward(ctx, dloss, _):
    return _backward(_policy_loss_bwd, ctx, dloss)


def _value_loss_backward(ctx, dloss, _):
    return _backward(_value_loss_bwd, ctx, dloss)


def _backward(op, ctx, dloss):
    *tensors, row_weights = ctx.saved_tensors
    slope = op(dloss.contiguous(), *tensors, *ctx.options, row_weights)
    constants = (None,) * (4 + len(ctx.options) + 1)
    return slope.to(tensors[0].dtype), *constants


torch.library.register_fake(_policy_loss_fwd, _loss_fake)
torch.library.register_fake(_value_loss_fwd, _loss_fake)
torch.library.register_fake(_policy_loss_bwd, _slope_fake)
torch.library.register_fake(_value_loss_bwd, _slope_fake)
torch.library.register_autograd(_policy_loss_fwd, _policy_loss_backward, setup_context=_save)
torch.library.register_autograd(_value_loss_fwd, _value_loss_backward, setup_context=_save)
