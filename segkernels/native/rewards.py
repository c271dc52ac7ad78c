"""Token rewards in the compiled extension."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..credit import SPREADS, Credit


def credit_arguments(
    credit: Credit, device: torch.device
) -> tuple[Tensor | None, int, bool, float]:
    """A credit as an operator on ``device`` takes it: (curve, spread, mean, clip).

    The curve is a tensor, because torch.compile compiles again for every new float.
    """
    curve = None if credit.normalizer is None else credit.normalizer.curve_on(device)
    return curve, SPREADS.index(credit.spread), credit.reduction == "mean", float(credit.clip)


def curve_address(curve: Tensor | None) -> tuple[int, bool]:
    """(address of ``Curve.packed``, whether that is on a GPU); 0 leaves rewards as they are."""
    return (0, False) if curve is None else (native.ptr(curve), native.on_gpu(curve))


@native.operator
def scatter_segment_rewards_fwd(
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
        curve_address(curve),
        spread,
        mean,
        clip,
        native.ptr(out),
        native.executor(rewards),
    )
    return out


@torch.library.register_fake(scatter_segment_rewards_fwd)
def _(rewards, *_):
    return native.empty_like(rewards)
