"""From segment rewards to token rewards."""

from __future__ import annotations

from torch import Tensor

from .backend import choose
from .credit import Credit, Reduction, Spread
from .layout import check_bools, check_floats, constants, layout_of
from .native import rewards as native
from .normalizer import Normalizer


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
        normalizer: any :class:`segkernels.Normalizer`; a running one applies its last fit.
        spread, reduction: see above.
        clip: positive; ``math.inf`` clips nothing.
        backend: see ``segkernels.backend``.

    Returns:
        like ``rewards``, fp32 (fp64 for fp64 rewards); 0 outside the mask. Not differentiable.

    Raises:
        ValueError: shapes that disagree; an unknown spread or reduction; a clip that is not
            positive.
        TypeError: dtypes that disagree; a normalizer of another type.
        RuntimeError: a running normalizer that was never fitted.
    """
    layout = layout_of("rewards", rewards, cu_seqlens)
    check_floats("rewards", rewards)
    check_bools("ends", ends, "rewards", rewards)
    check_bools("mask", mask, "rewards", rewards)
    credit = Credit(normalizer, spread, reduction, clip)
    chosen = choose("scatter_segment_rewards", rewards, backend=backend)
    (rewards,) = constants(rewards)
    if chosen == "reference":
        from .reference import rewards as reference

        return reference.scatter_segment_rewards(rewards, ends, mask, layout, credit)
    return native.scatter_segment_rewards_fwd(
        rewards.contiguous(),
        ends.contiguous(),
        mask.contiguous(),
        layout.cu_seqlens,
        *native.credit_arguments(credit, rewards.device),
    )
