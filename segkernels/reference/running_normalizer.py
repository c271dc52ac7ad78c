"""What a running normaliser collects, plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import layout_of
from ..normalizer_fit import binned_moments, check_finite_rewards
from ._actions import actions
from .rewards import segments


def location_moments(
    rewards: Tensor, ends: Tensor, mask: Tensor, cu_seqlens: Tensor | None, bins: int
) -> Tensor:
    """Moments [3, bins] of the rewards at the ends of segments, by relative position."""
    at_ends = rewards[ends & mask]
    check_finite_rewards(int((~at_ends.isfinite()).sum()), at_ends.numel())
    acts = actions(mask, layout_of("rewards", rewards, cu_seqlens))
    p = segments(ends, acts).positions(torch.float64)
    return binned_moments(p.cpu(), at_ends, bins)
