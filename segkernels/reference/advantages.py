"""Generalised advantage estimation and whitening, plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import Layout
from ._actions import Actions, accumulation_dtype, actions
from .rewards import pay

VARIANCE_FLOOR = 1e-8  # the same number as segk::kVarianceFloor


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


def _gae(
    rewards: Tensor, values: Tensor, acts: Actions, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Advantages and returns from dense [A] rewards and values."""
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
    advantages, returns = _gae(*dense, acts, gamma, lam)
    return acts.put(advantages), acts.put(returns)


def segment_advantages(
    rewards: Tensor,
    ends: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    mask: Tensor,
    layout: Layout,
    *,
    normalizer,
    spread: str,
    reduction: str,
    clip: float,
    kl_coef: float,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    acts = actions(mask, layout)
    dtype = accumulation_dtype(rewards, logprobs, ref_logprobs, values)
    token_rewards = pay(
        rewards,
        ends,
        acts,
        dtype,
        normalizer=normalizer,
        spread=spread,
        reduction=reduction,
        clip=clip,
    )
    kl = acts.take(logprobs).to(dtype) - acts.take(ref_logprobs).to(dtype)
    advantages, returns = _gae(
        token_rewards - kl_coef * kl, acts.take(values).to(dtype), acts, gamma, lam
    )
    return acts.put(advantages), acts.put(returns), acts.put(token_rewards), acts.put(kl)


def moments(x: Tensor, mask: Tensor) -> Tensor:
    """Count, mean and summed squared deviation [3] of x[mask]."""
    x = x[mask].to(accumulation_dtype(x))
    count = x.new_tensor(float(x.numel()))
    mean = x.sum() / count.clamp(min=1)
    return torch.stack([count, mean, (x - mean).square().sum()])


def whiten(x: Tensor, mask: Tensor, moments: Tensor, center: bool) -> Tensor:
    dtype = accumulation_dtype(x)
    count, mean, m2 = moments.to(dtype)
    std = (m2 / count.clamp(min=1)).clamp(min=VARIANCE_FLOOR).sqrt()
    white = (x[mask].to(dtype) - mean) / std
    if not center:
        white = white + mean
    out = torch.zeros(x.shape, dtype=dtype, device=x.device)
    return out.masked_scatter(mask, white)
