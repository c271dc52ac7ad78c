"""Segment scores and the Bradley-Terry loss over them, which trains a segment reward model."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from . import native
from .backend import choose
from .layout import Layout, check_bools, check_device, check_floats, constants, layout_of, number
from .reference import bradley_terry as reference

Reduction = Literal["mean", "sum"]


class BradleyTerry(NamedTuple):
    """What ``segment_bradley_terry`` returns."""

    loss: Tensor  # []
    scores: Tensor  # [N]
    accuracy: Tensor  # []


def segment_scores(
    rewards: Tensor,
    ends: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    reduction: Reduction = "mean",
    backend: str | None = None,
) -> Tensor:
    """One score per row: the mean or sum of its segment rewards.

    The reward r_k of segment k is ``rewards`` at its end; with K segments in a row the score is
    (1/K) sum_k r_k for ``"mean"``, sum_k r_k for ``"sum"``. A row with no segment scores 0 and gets
    no gradient. Only tokens at ``ends`` are read.

    Source: arXiv 2501.02790, reward model training (there the mean).

    Args:
        rewards: reward model output after each token, float ``[N, T]``, or ``[T]`` with
            ``cu_seqlens``.
        ends: bool like ``rewards``, from ``segment_ends``.
        mask: bool like ``rewards``, True at action tokens; only checked against ``ends``, which
            must lie inside it.
        cu_seqlens: int32 ``[N + 1]``, rows of a flat stream.
        reduction: ``"mean"`` or ``"sum"``.
        backend: see ``segkernels.backend``.

    Returns:
        ``[N]``, fp32 (fp64 for fp64 rewards); differentiable in ``rewards``.

    Raises:
        ValueError: shapes that disagree; an unknown reduction.
        TypeError: dtypes that disagree.
    """
    layout = _check(rewards, ends, mask, cu_seqlens, reduction)
    mean = reduction == "mean"
    if choose("segment_scores", rewards, backend=backend) == "reference":
        return reference.segment_scores(rewards, ends, mask, layout, mean)
    scores, _ = _segment_scores_fwd(
        rewards.contiguous(),
        ends.contiguous(),
        None if mask is None else mask.contiguous(),
        layout.cu_seqlens,
        mean,
    )
    return scores


def segment_bradley_terry(
    rewards: Tensor,
    ends: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    reduction: Reduction = "mean",
    margin: Tensor | None = None,
    label_smoothing: float = 0.0,
    center_coef: float = 0.0,
    backend: str | None = None,
) -> BradleyTerry:
    """Bradley-Terry loss over segment scores, with its gradient in one pass over the tokens.

    Rows come as all chosen, then all rejected: row i is preferred over row i + N/2. With
    e = ``segment_scores(...)``, eps = ``label_smoothing`` and d = e_chosen - e_rejected - margin::

        loss = mean[-(1 - eps) log sigmoid(d) - eps log sigmoid(-d)]
               + center_coef * mean[(e_chosen + e_rejected)^2]

    finite for every finite d.

    Source: arXiv 2501.02790, reward model training; margin from Llama 2
    (arXiv 2307.09288), centring from arXiv 2312.09244.

    Args:
        rewards: reward model output after each token, float ``[N, T]``, or ``[T]`` with
            ``cu_seqlens``; N even and at least 2.
        ends: bool like ``rewards``, from ``segment_ends``.
        mask: as in ``segment_scores``.
        cu_seqlens: int32 ``[N + 1]``, rows of a flat stream.
        reduction: ``"mean"`` or ``"sum"`` of segment rewards.
        margin: float ``[N/2]``, a constant: no gradient flows into it.
        label_smoothing: probability in [0, 1] that a label is wrong.
        center_coef: weight >= 0 of the pull of scores towards zero mean.
        backend: see ``segkernels.backend``.

    Returns:
        ``BradleyTerry(loss [], scores [N], accuracy [])``, fp32 (fp64 when an input is fp64). loss
        and scores are differentiable in ``rewards``. accuracy is the share of pairs with
        e_chosen > e_rejected; the margin does not count, ties and NaN are wrong.

    Raises:
        ValueError: shapes that disagree; an odd number of rows, or none; an unknown reduction;
            smoothing or centring out of range.
        TypeError: dtypes that disagree.
    """
    layout = _check(rewards, ends, mask, cu_seqlens, reduction)
    pairs = layout.n_rows // 2
    if layout.n_rows % 2 or not pairs:
        raise ValueError(
            f"rewards: expected an even number of rows, at least 2, got {layout.n_rows}; stack all "
            "chosen rows, then all rejected ones"
        )
    if margin is not None:
        check_floats("margin", margin)
        if margin.shape != (pairs,):
            raise ValueError(
                f"margin: expected shape [{pairs}], one per pair, got {list(margin.shape)}; pass "
                "how much better each chosen row is"
            )
        check_device("margin", margin, "rewards", rewards)
        (margin,) = constants(margin)
    if not 0 <= number("label_smoothing", label_smoothing) <= 1:
        raise ValueError(
            f"label_smoothing: expected a probability in [0, 1], got {label_smoothing}; "
            "pass 0.0 to trust every label"
        )
    if not number("center_coef", center_coef) >= 0:
        raise ValueError(
            f"center_coef: expected a weight >= 0, got {center_coef}; pass 0.0 for no centring"
        )
    mean = reduction == "mean"
    if choose("segment_bradley_terry", rewards, margin, backend=backend) == "reference":
        return BradleyTerry(
            *reference.segment_bradley_terry(
                rewards, ends, mask, layout, mean, margin, label_smoothing, center_coef
            )
        )
    loss, scores, accuracy, _, _ = _segment_bradley_terry_fwd(
        rewards.contiguous(),
        ends.contiguous(),
        None if mask is None else mask.contiguous(),
        layout.cu_seqlens,
        None if margin is None else margin.float().contiguous(),
        mean,
        float(label_smoothing),
        float(center_coef),
    )
    return BradleyTerry(loss, scores, accuracy.detach())


def _check(
    rewards: Tensor,
    ends: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    reduction: str,
) -> Layout:
    layout = layout_of("rewards", rewards, cu_seqlens)
    check_floats("rewards", rewards)
    check_bools("ends", ends, "rewards", rewards)
    if mask is not None:
        check_bools("mask", mask, "rewards", rewards)
    if reduction not in ("mean", "sum"):
        raise ValueError(
            f"reduction: expected 'mean' or 'sum', got {reduction!r}; 'mean' is the paper's"
        )
    return layout


@native.operator
def _segment_scores_fwd(
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
        native.place(rewards),
    )
    return scores, counts


@native.operator
def _segment_scores_bwd(
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
        native.place(dscores),
    )
    return drewards


@torch.library.register_fake(_segment_scores_fwd)
def _(rewards, ends, mask, cu_seqlens, mean):
    n_rows = rewards.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return (
        native.empty(rewards, n_rows),
        native.empty(rewards, n_rows, dtype=torch.int32),
    )


@torch.library.register_fake(_segment_scores_bwd)
def _(dscores, counts, ends, mask, cu_seqlens, mean):
    return native.empty_like(ends)


def _save_scores(ctx, inputs, output):
    rewards, ends, mask, cu_seqlens, ctx.mean = inputs
    _, counts = output
    ctx.save_for_backward(counts, ends, mask, cu_seqlens)
    ctx.dtype = rewards.dtype


def _scores_backward(ctx, dscores, _):
    drewards = _segment_scores_bwd(dscores.contiguous(), *ctx.saved_tensors, ctx.mean)
    return drewards.to(ctx.dtype), None, None, None, None


torch.library.register_autograd(_segment_scores_fwd, _scores_backward, setup_context=_save_scores)


@native.operator
def _segment_bradley_terry_fwd(
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
    slopes = native.empty_like(scores)
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
        native.ptr(slopes),
        native.ptr(scratch),
        native.place(rewards),
    )
    return loss, scores, accuracy, counts, slopes


@native.operator
def _segment_bradley_terry_bwd(
    dloss: Tensor | None,
    dscores: Tensor | None,
    slopes: Tensor,
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
        native.ptr(slopes),
        native.ptr(counts),
        native.ptr(ends),
        native.ptr(mask),
        native.rows(ends, cu_seqlens),
        mean,
        native.ptr(drewards),
        native.place(ends),
    )
    return drewards


@torch.library.register_fake(_segment_bradley_terry_fwd)
def _(rewards, ends, mask, cu_seqlens, margin, mean, label_smoothing, center_coef):
    n_rows = rewards.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    scalar = native.empty(rewards)
    scores = native.empty(rewards, n_rows)
    counts = native.empty_like(scores, torch.int32)
    return scalar, scores, native.empty_like(scalar), counts, native.empty_like(scores)


@torch.library.register_fake(_segment_bradley_terry_bwd)
def _(dloss, dscores, slopes, counts, ends, mask, cu_seqlens, mean):
    return native.empty_like(ends)


def _save_bradley_terry(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    rewards, ends, mask, cu_seqlens, _, ctx.mean, _, _ = inputs
    _, _, _, counts, slopes = output
    ctx.save_for_backward(slopes, counts, ends, mask, cu_seqlens)
    ctx.dtype = rewards.dtype


def _bradley_terry_backward(ctx, dloss, dscores, *_):
    if dscores is not None:
        dscores = dscores.contiguous()
    drewards = _segment_bradley_terry_bwd(dloss, dscores, *ctx.saved_tensors, ctx.mean)
    return drewards.to(ctx.dtype), *[None] * 7


torch.library.register_autograd(
    _segment_bradley_terry_fwd, _bradley_terry_backward, setup_context=_save_bradley_terry
)
