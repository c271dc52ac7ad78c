"""Segment scores and the Bradley-Terry loss over them, which trains a segment reward model."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor

from .backend import choose
from .layout import Layout, check_bools, check_device, check_floats, constants, layout_of, number
from .native import bradley_terry as native

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
        from .reference import bradley_terry as reference

        return reference.segment_scores(rewards, ends, mask, layout, mean)
    scores, _ = native.segment_scores_fwd(
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
        from .reference import bradley_terry as reference

        return BradleyTerry(
            *reference.segment_bradley_terry(
                rewards, ends, mask, layout, mean, margin, label_smoothing, center_coef
            )
        )
    loss, scores, accuracy, _, _ = native.segment_bradley_terry_fwd(
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
