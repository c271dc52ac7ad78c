"""Segment scores and the Bradley-Terry loss in the compiled extension."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native


@native.operator
def segment_scores_fwd(
    rewards: Tensor,
    ends: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    mean: bool,
) -> tuple[Tensor, Tensor]:
    rows = native.rows(rewards, cu_seqlens)
    scores = native.empty(rewards, rows[0])
    counts = native.empty(rewards, rows[0], dtype=torch.int32)
    native.kernels(rewards).segment_scores_fwd(
        native.floats(rewards),
        native.ptr(ends),
        native.ptr(mask),
        rows,
        mean,
        native.ptr(scores),
        native.ptr(counts),
        native.executor(rewards),
    )
    return scores, counts


@native.operator
def segment_scores_bwd(
    dscores: Tensor,
    counts: Tensor,
    ends: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    mean: bool,
) -> Tensor:
    drewards = native.empty_like(ends)
    native.kernels(dscores).segment_scores_bwd(
        native.ptr(dscores),
        native.ptr(counts),
        native.ptr(ends),
        native.ptr(mask),
        native.rows(ends, cu_seqlens),
        mean,
        native.ptr(drewards),
        native.executor(dscores),
    )
    return drewards


@torch.library.register_fake(segment_scores_fwd)
def _(rewards, ends, mask, cu_seqlens, mean):
    n_rows = rewards.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return (
        native.empty(rewards, n_rows),
        native.empty(rewards, n_rows, dtype=torch.int32),
    )


@torch.library.register_fake(segment_scores_bwd)
def _(dscores, counts, ends, mask, cu_seqlens, mean):
    return native.empty_like(ends)


def _save_scores(ctx, inputs, output):
    rewards, ends, mask, cu_seqlens, ctx.mean = inputs
    _, counts = output
    ctx.save_for_backward(counts, ends, mask, cu_seqlens)
    ctx.dtype = rewards.dtype


def _scores_backward(ctx, dscores, _):
    arguments = (dscores.contiguous(), *ctx.saved_tensors, ctx.mean)
    drewards = native.gradient("segment_scores", segment_scores_bwd, *arguments)
    return drewards.to(ctx.dtype), None, None, None, None


torch.library.register_autograd(segment_scores_fwd, _scores_backward, setup_context=_save_scores)


@native.operator
def segment_bradley_terry_fwd(
    rewards: Tensor,
    ends: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    margin: Tensor | None,
    mean: bool,
    label_smoothing: float,
    center_coef: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = native.rows(rewards, cu_seqlens)
    loss = native.empty(rewards)
    scores = native.empty(rewards, rows[0])
    accuracy = native.empty_like(loss)
    counts = native.empty_like(scores, torch.int32)
    score_grads = native.empty_like(scores)
    scratch = native.scratch(rewards)
    native.kernels(rewards).segment_bradley_terry_fwd(
        native.floats(rewards),
        native.ptr(ends),
        native.ptr(mask),
        rows,
        native.ptr(margin),
        mean,
        label_smoothing,
        center_coef,
        native.ptr(loss),
        native.ptr(scores),
        native.ptr(accuracy),
        native.ptr(counts),
        native.ptr(score_grads),
        native.ptr(scratch),
        native.executor(rewards),
    )
    return loss, scores, accuracy, counts, score_grads


@native.operator
def segment_bradley_terry_bwd(
    dloss: Tensor | None,
    dscores: Tensor | None,
    score_grads: Tensor,
    counts: Tensor,
    ends: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    mean: bool,
) -> Tensor:
    drewards = native.empty_like(ends)
    native.kernels(ends).segment_bradley_terry_bwd(
        native.ptr(dloss),
        native.ptr(dscores),
        native.ptr(score_grads),
        native.ptr(counts),
        native.ptr(ends),
        native.ptr(mask),
        native.rows(ends, cu_seqlens),
        mean,
        native.ptr(drewards),
        native.executor(ends),
    )
    return drewards


@torch.library.register_fake(segment_bradley_terry_fwd)
def _(rewards, ends, mask, cu_seqlens, margin, mean, label_smoothing, center_coef):
    n_rows = rewards.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    scalar = native.empty(rewards)
    scores = native.empty(rewards, n_rows)
    counts = native.empty_like(scores, torch.int32)
    return scalar, scores, native.empty_like(scalar), counts, native.empty_like(scores)


@torch.library.register_fake(segment_bradley_terry_bwd)
def _(dloss, dscores, score_grads, counts, ends, mask, cu_seqlens, mean):
    return native.empty_like(ends)


def _save_bradley_terry(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    rewards, ends, mask, cu_seqlens, _, ctx.mean, _, _ = inputs
    _, _, _, counts, score_grads = output
    ctx.save_for_backward(score_grads, counts, ends, mask, cu_seqlens)
    ctx.dtype = rewards.dtype


def _bradley_terry_backward(ctx, dloss, dscores, *_):
    if dscores is not None:
        dscores = dscores.contiguous()
    arguments = (dloss, dscores, *ctx.saved_tensors, ctx.mean)
    drewards = native.gradient("segment_bradley_terry", segment_bradley_terry_bwd, *arguments)
    return drewards.to(ctx.dtype), *[None] * 7


torch.library.register_autograd(
    segment_bradley_terry_fwd, _bradley_terry_backward, setup_context=_save_bradley_terry
)
