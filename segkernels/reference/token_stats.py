"""Log-probabilities and entropy of rows of logits in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ._actions import accumulation_dtype


def token_stats(
    logits: Tensor, targets: Tensor | None, temperature: float | Tensor, mask: Tensor | None
) -> tuple[Tensor | None, Tensor]:
    shape = logits.shape[:-1]
    rows = take_rows(logits, shape, mask)  # [A, V]
    stats = row_stats(rows, *take_per_row(targets, temperature, shape, mask))
    return put_rows(stats, shape, mask)


def row_stats(
    logits: Tensor, targets: Tensor | None, temperature: float | Tensor
) -> tuple[Tensor | None, Tensor]:
    """(logprobs [A] or None, entropy [A]) of logits [A, V]."""
    z = logits.to(accumulation_dtype(logits))
    z = z / (temperature.to(z.dtype)[:, None] if isinstance(temperature, Tensor) else temperature)
    # The maximum is a constant here: neither result depends on a shift of z.
    d = z - z.amax(-1, keepdim=True).detach()
    e = d.exp()
    sum_exp = e.sum(-1)
    # exp(d) d tends to 0 at -inf, where the product is NaN.
    sum_exp_d = (e * d.masked_fill(d == -torch.inf, 0)).sum(-1)
    entropy = sum_exp.log() - sum_exp_d / sum_exp
    if targets is None:
        return None, entropy
    has_target = targets >= 0
    at_target = d.gather(-1, targets.clamp(min=0)[:, None])[:, 0]
    logprobs = at_target - sum_exp.log()
    return torch.where(has_target, logprobs, torch.zeros_like(logprobs)), entropy


def take_rows(x: Tensor, shape: torch.Size, mask: Tensor | None) -> Tensor:
    """[A, ...] the rows of x [*shape, ...] that the mask keeps."""
    return x.reshape(shape.numel(), *x.shape[len(shape) :]) if mask is None else x[mask]


def take_per_row(
    targets: Tensor | None, temperature: float | Tensor, shape: torch.Size, mask: Tensor | None
) -> tuple[Tensor | None, float | Tensor]:
    if targets is not None:
        targets = take_rows(targets, shape, mask)
    if isinstance(temperature, Tensor):
        temperature = take_rows(temperature, shape, mask)
    return targets, temperature


def put_rows(
    stats: tuple[Tensor | None, Tensor], shape: torch.Size, mask: Tensor | None
) -> tuple[Tensor | None, Tensor]:
    """Statistics [A] in ``shape``, with 0 where the mask is False."""

    def put(values: Tensor) -> Tensor:
        if mask is None:
            return values.view(shape)
        return values.new_zeros(shape).masked_scatter(mask, values)

    logprobs, entropy = stats
    return None if logprobs is None else put(logprobs), put(entropy)
