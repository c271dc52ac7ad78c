"""From segment rewards to token rewards."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from . import native
from .backend import choose
from .layout import check_bools, check_floats, constants, layout_of, number
from .normalizer import Normalizer
from .reference import rewards as reference

Spread = Literal["even", "repeat", "last"]
Reduction = Literal["sum", "mean"]
SPREADS: tuple[str, ...] = get_args(Spread)  # in the order of segk::Spread


def scatter_segment_rewards(
    rewards: Tensor,
    ends: Tensor,
    mask: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    normalizer: Normalizer | None = None,
    spread: Spread = "even",
    reduction: Reduction = "sum",
    clip: float = 10.0,
    backend: str | None = None,
) -> Tensor:
    """Pays the reward of every segment to its tokens.

    The reward r_k of segment k = 0 .. K-1 of a row is ``rewards`` at its end, L_k its number of
    action tokens and p = (k + 1) / K its relative position. In this order:

    1. r_k becomes (r_k - mean(p)) / std(p) by ``normalizer``; None leaves it.
    2. ``spread``: "even" pays r_k / L_k to every token of the segment, "repeat" pays r_k to every
       token, "last" pays r_k to the end alone.
    3. ``reduction="mean"`` divides by K: spread evenly or paid last, a row's token rewards then
       add up to the mean of its segment rewards. "sum" does not; its returns are about K times as
       large, which makes the same KL coefficient K times weaker.
    4. Clipped to [-clip, clip]. A reward that is not finite pays NaN.

    Action tokens behind the last end of their row lie in no segment and get 0, as does every token
    of a row without ends.

    Source: arXiv 2501.02790, section 3; ``reduction="mean"`` is ours.

    Args:
        rewards: reward model output after each token, float ``[N, T]``, or ``[T]`` with
            ``cu_seqlens``. Read at ends only.
        ends: bool like ``rewards``, from ``segment_ends``. Read at action tokens only.
        mask: bool like ``rewards``, True at action tokens.
        cu_seqlens: int32 ``[N + 1]``, rows of a flat stream.
        normalizer: any of ``segkernels.normalizer``; a running one applies its last fit.
        spread, reduction: see above.
        clip: positive; ``math.inf`` clips nothing.
        backend: see ``segkernels.backend``.

    Returns:
        like ``rewards``, fp32 (fp64 for fp64 rewards); 0 outside the mask. Not differentiable.

    Raises:
        ValueError: shapes that disagree; an unknown spread or reduction; a clip that is not
            positive.
        TypeError: dtypes that disagree; a normalizer that is none.
        RuntimeError: a running normalizer that was never fitted.
    """
    layout = layout_of("rewards", rewards, cu_seqlens)
    check_floats("rewards", rewards)
    check_bools("ends", ends, "rewards", rewards)
    check_bools("mask", mask, "rewards", rewards)
    check_credit(normalizer, spread, reduction, clip)
    (rewards,) = constants(rewards)
    if choose("scatter_segment_rewards", rewards, backend=backend) == "reference":
        return reference.scatter_segment_rewards(
            rewards,
            ends,
            mask,
            layout,
            normalizer=normalizer,
            spread=spread,
            reduction=reduction,
            clip=clip,
        )
    return _scatter_segment_rewards_fwd(
        rewards.contiguous(),
        ends.contiguous(),
        mask.contiguous(),
        layout.cu_seqlens,
        packed_curve(normalizer),
        SPREADS.index(spread),
        reduction == "mean",
        float(clip),
    )


def check_credit(normalizer: Normalizer | None, spread: str, reduction: str, clip: float) -> None:
    """Raises for options of ``scatter_segment_rewards`` that it cannot take."""
    if normalizer is not None and not isinstance(normalizer, Normalizer):
        raise TypeError(
            "normalizer: expected a LocationNormalizer, TableNormalizer, ScalarNormalizer, "
            f"RunningLocationNormalizer or None, got {type(normalizer).__name__}; read one from a "
            "dict with normalizer_from_dict"
        )
    if spread not in SPREADS:
        raise ValueError(
            f"spread: expected one of {', '.join(SPREADS)}, got {spread!r}; 'even' divides a "
            "segment's reward by its length"
        )
    if reduction not in get_args(Reduction):
        raise ValueError(
            f"reduction: expected 'sum' or 'mean', got {reduction!r}; 'mean' divides by the number "
            "of segments"
        )
    if not number("clip", clip) > 0:
        raise ValueError(
            f"clip: expected a positive number, got {clip}; pass math.inf to clip nothing"
        )


def packed_curve(normalizer: Normalizer | None) -> Tensor | None:
    """``Curve.packed`` for a custom operator."""
    return None if normalizer is None else normalizer.curve.packed


def native_curve(packed: Tensor | None) -> tuple[int, int]:
    """(address of ``Curve.packed``, number of its knots); 0 of them leave rewards as they are."""
    return (0, 0) if packed is None else (native.ptr(packed), packed.numel() // 3 - 1)


@native.operator
def _scatter_segment_rewards_fwd(
    rewards: Tensor,
    ends: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor | None,
    curve: Tensor | None,
    spread: int,
    mean: bool,
    clip: float,
) -> Tensor:
    out = native.empty_like(rewards)
    native.kernels(rewards).scatter_segment_rewards_fwd(
        native.floats(rewards),
        native.ptr(ends),
        native.ptr(mask),
        native.rows(rewards, cu_seqlens),
        native_curve(curve),
        spread,
        mean,
        clip,
        native.ptr(out),
        native.place(rewards),
    )
    return out


@torch.library.register_fake(_scatter_segment_rewards_fwd)
def _(rewards, *_):
    return native.empty_like(rewards)
