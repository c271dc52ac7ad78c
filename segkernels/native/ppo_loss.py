"""PPO's policy and value losses in the compiled extension."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native


@native.operator
def policy_loss_fwd(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    ref_logprobs: Tensor | None,
    entropy: Tensor | None,
    mask: Tensor,
    cu_seqlens: Tensor | None,
    low: float,
    high: float,
    kl_coef: float,
    entropy_coef: float,
    aggregation: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss, clip_fraction, approx_kl, and the weight of a token of each row."""
    rows = native.rows(logprobs, cu_seqlens)
    loss, clip_fraction, approx_kl = (native.empty(logprobs) for _ in range(3))
    row_weights = native.empty(logprobs, rows[0], dtype=torch.float64)
    scratch = native.scratch(logprobs)
    native.kernels(logprobs).policy_loss_fwd(
        native.floats(logprobs),
        native.floats(old_logprobs),
        native.floats(advantages),
        _floats_or_none(ref_logprobs, logprobs),
        _floats_or_none(entropy, logprobs),
        native.ptr(mask),
        rows,
        low,
        high,
        kl_coef,
        entropy_coef,
        aggregation,
        native.ptr(loss),
        native.ptr(clip_fraction),
        native.ptr(approx_kl),
        native.ptr(row_weights),
        native.ptr(scratch),
        native.executor(logprobs),
    )
    return loss, clip_fraction, approx_kl, row_weights


@native.operator
def policy_loss_bwd(
    dloss: Tensor,
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    ref_logprobs: Tensor | None,
    mask: Tensor,
    cu_seqlens: Tensor | None,
    low: float,
    high: float,
    kl_coef: float,
    entropy_coef: float,
    row_weights: Tensor,
    need_entropy: bool,
) -> tuple[Tensor, Tensor]:
    """dlogprobs, and dentropy, which has no element where it is not needed."""
    dlogprobs = native.empty_like(logprobs)
    dentropy = native.empty_like(logprobs) if need_entropy else native.empty(logprobs, 0)
    native.kernels(dloss).policy_loss_bwd(
        native.ptr(dloss),
        native.floats(logprobs),
        native.floats(old_logprobs),
        native.floats(advantages),
        _floats_or_none(ref_logprobs, logprobs),
        native.ptr(mask),
        native.rows(logprobs, cu_seqlens),
        low,
        high,
        kl_coef,
        entropy_coef,
        native.ptr(row_weights),
        native.ptr(dlogprobs),
        native.ptr(dentropy) if need_entropy else 0,
        native.executor(dloss),
    )
    return dlogprobs, dentropy


def _floats_or_none(tensor: Tensor | None, like: Tensor) -> tuple[int, int]:
    return (0, native.DTYPES[like.dtype]) if tensor is None else native.floats(tensor)


@native.operator
def value_loss_fwd(
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
def value_loss_bwd(
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


@torch.library.register_fake(policy_loss_fwd)
def _(logprobs, old_logprobs, advantages, ref_logprobs, entropy, mask, cu_seqlens, *options):
    scalars = (native.empty(logprobs) for _ in range(3))
    return *scalars, native.empty(logprobs, _n_rows(logprobs, cu_seqlens), dtype=torch.float64)


@torch.library.register_fake(policy_loss_bwd)
def _(dloss, logprobs, *rest):
    need_entropy = rest[-1]
    dentropy = native.empty_like(logprobs) if need_entropy else native.empty(logprobs, 0)
    return native.empty_like(logprobs), dentropy


@torch.library.register_fake(value_loss_fwd)
def _(values, old_values, returns, mask, cu_seqlens, *options):
    weights = native.empty(values, _n_rows(values, cu_seqlens), dtype=torch.float64)
    return native.empty(values), weights


@torch.library.register_fake(value_loss_bwd)
def _(dloss, values, *rest):
    return native.empty_like(values)


def _n_rows(like, cu_seqlens):
    return like.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _save_policy(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    *tensors, entropy, mask, cu_seqlens, low, high, kl_coef, entropy_coef, _ = inputs
    ctx.save_for_backward(*tensors, mask, cu_seqlens, output[3])
    ctx.options = low, high, kl_coef, entropy_coef
    ctx.entropy_dtype = None if entropy is None else entropy.dtype
    ctx.mark_non_differentiable(*output[1:])


def _policy_backward(ctx, dloss, *_):
    *tensors, row_weights = ctx.saved_tensors
    need_entropy = ctx.needs_input_grad[4]
    arguments = (dloss.contiguous(), *tensors, *ctx.options, row_weights, need_entropy)
    dlogprobs, dentropy = native.gradient("policy_loss", policy_loss_bwd, *arguments)
    dentropy = dentropy.to(ctx.entropy_dtype) if need_entropy else None
    return dlogprobs.to(tensors[0].dtype), None, None, None, dentropy, *[None] * 7


def _save_value(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    *tensors, ctx.clip, _ = inputs
    ctx.save_for_backward(*tensors, output[1])


def _value_backward(ctx, dloss, _):
    *tensors, row_weights = ctx.saved_tensors
    arguments = (dloss.contiguous(), *tensors, ctx.clip, row_weights)
    dvalues = native.gradient("value_loss", value_loss_bwd, *arguments)
    return dvalues.to(tensors[0].dtype), *[None] * 6


torch.library.register_autograd(policy_loss_fwd, _policy_backward, setup_context=_save_policy)
torch.library.register_autograd(value_loss_fwd, _value_backward, setup_context=_save_value)
