"""Generalised advantage estimation, plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import Layout
from ._actions import Actions, accumulation_dtype, actions


def _discounted_sums(x: Tensor, decay: float, acts: Actions) -> Tensor:
    """[A] y_i = x_i + decay y_{i+1} within each row, by doubling: log2(longest row) steps."""
    left = acts.counts[acts.row] - acts.rank  # [A] tokens from here to the end of the row
    longest = int(left.max()) if left.numel() else 0
    step = 1
    while step < longest:
        reaches = left > step
        later = torch.where(reaches, x.roll(-step), 0.0)
        x = torch.where(reaches, x + decay**step * later, x)
        step *= 2
    return x


def dense_gae(
    rewards: Tensor, values: Tensor, acts: Actions, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Advantages and returns [A] from rewards and values [A] of the action tokens."""
    is_last = acts.rank == acts.counts[acts.row] - 1
    next_values = torch.where(is_last, 0.0, values.roll(-1))
    advantages = _discounted_sums(rewards + gamma * next_values - values, gamma * lam, acts)
    return advantages, advantages + values


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, layout: Layout, *, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    acts = actions(mask, layout)
    dtype = accumulation_dtype(rewards, values)
    dense = acts.take(rewards).to(dtype), acts.take(values).to(dtype)
    advantages, returns = dense_gae(*dense, acts, gamma, lam)
    return acts.put(advantages), acts.put(returns)
