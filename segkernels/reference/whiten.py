"""Whitening, plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ._actions import accumulation_dtype

VARIANCE_FLOOR = 1e-8


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
