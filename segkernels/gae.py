"""Generalised advantage estimation."""

from __future__ import annotations

from torch import Tensor

from .backend import choose
from .layout import check_bools, check_floats, check_floats_like, constants, layout_of, number
from .native import gae as native


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
    check_floats_like("values", values, "rewards", rewards)
    check_bools("mask", mask, "rewards", rewards)
    check_discounts(gamma, lam)
    chosen = choose("gae", rewards, values, backend=backend)
    rewards, values = constants(rewards, values)
    if chosen == "reference":
        from .reference import gae as reference

        return reference.gae(rewards, values, mask, layout, gamma=gamma, lam=lam)
    return native.gae_fwd(
        rewards.contiguous(),
        values.contiguous(),
        mask.contiguous(),
        layout.cu_seqlens,
        float(gamma),
        float(lam),
    )


def check_discounts(gamma: float, lam: float) -> None:
    for name, value in (("gamma", gamma), ("lam", lam)):
        if not 0 <= number(name, value) <= 1:
            raise ValueError(
                f"{name}: expected a number in [0, 1], got {value}; 1.0 discounts nothing"
            )
