"""Row statistics of vocabulary shards and their merge in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ._actions import accumulation_dtype
from .token_stats import put_rows, take_per_row, take_rows


def empty_states(logits: Tensor) -> Tensor:
    """[..., 4] what is known of rows before their first column."""
    states = torch.zeros(*logits.shape[:-1], 4, dtype=torch.float64, device=logits.device)
    states[..., 0] = -torch.inf
    states[..., 3] = torch.inf
    return states


def shard_stats(
    logits: Tensor,
    targets: Tensor | None,
    vocab_start: int,
    temperature: float | Tensor,
    mask: Tensor | None,
) -> Tensor:
    shape = logits.shape[:-1]
    z = _columns(logits, mask)
    targets, temperature = take_per_row(targets, temperature, shape, mask)
    top = z.amax(-1)
    total, weighted = _sums(z, top.masked_fill(top == -torch.inf, 0), temperature)
    nowhere = torch.full_like(top, torch.inf)
    target = nowhere if targets is None else _at_target(z, targets - vocab_start, nowhere)
    states = torch.stack([top, total, weighted, target], -1).double()
    if mask is None:
        return states.view(*shape, 4)
    return empty_states(logits).masked_scatter(mask[..., None], states)


def merge(states: Tensor, temperature: float | Tensor) -> Tensor:
    """[..., 4] of whole rows from those [shards, ..., 4] of their shards."""
    shard_max, sums, weighted, targets = states.unbind(-1)
    top = shard_max.amax(0)
    lower = (shard_max - top) / temperature
    factor = lower.exp()
    # A shard of -inf has nothing to measure from another maximum; 0 times -inf would be NaN.
    kept = lower.masked_fill(factor == 0, 0)
    target = targets.amin(0)
    return torch.stack(
        [
            top,
            (factor * sums).sum(0),
            (factor * (weighted + sums * kept)).sum(0),
            target.masked_fill(target == torch.inf, torch.nan),  # in no shard
        ],
        -1,
    )


def logprobs_and_entropy(
    states: Tensor,
    logits: Tensor,
    targets: Tensor | None,
    vocab_start: int,
    temperature: float | Tensor,
    mask: Tensor | None,
) -> tuple[Tensor | None, Tensor]:
    shape = logits.shape[:-1]
    whole = take_rows(merge(states, temperature), shape, mask)
    z = _columns(logits, mask)
    targets, temperature = take_per_row(targets, temperature, shape, mask)
    top, total, weighted, target = whole.unbind(-1)
    # The other shards' parts are constants here: the gradient is that of this shard.
    total, weighted = (
        of_all + (own - own.detach())
        for of_all, own in zip(
            (total, weighted), _sums(z, top.to(z.dtype), temperature), strict=True
        )
    )
    entropy = (total.log() - weighted / total).to(z.dtype)
    if targets is None:
        return put_rows((None, entropy), shape, mask)
    target = _at_target(z, targets - vocab_start, target)
    logprobs = ((target - top) / temperature - total.log()).to(z.dtype)
    return put_rows((logprobs.masked_fill(targets < 0, 0), entropy), shape, mask)


def _columns(logits: Tensor, mask: Tensor | None) -> Tensor:
    """[A, V + 1] the rows that the mask keeps; the banned token at the end adds nothing, and is
    there for shards without any column."""
    rows = take_rows(logits, logits.shape[:-1], mask)
    return pad(rows.to(accumulation_dtype(logits)), (0, 1), value=-torch.inf)


def _sums(z: Tensor, top: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
    """Sums of exp(d) and of exp(d) d, d = (z - top) / temperature."""
    divisor = temperature.to(z.dtype)[:, None] if isinstance(temperature, Tensor) else temperature
    d = (z - top[:, None]) / divisor
    e = d.exp()
    return e.sum(-1), (e * d.masked_fill(d == -torch.inf, 0)).sum(-1)


def _at_target(z: Tensor, local: Tensor, otherwise: Tensor) -> Tensor:
    """[A] logits of the targets that lie in this shard, ``otherwise`` of those that do not."""
    columns = z.shape[-1] - 1
    here = (local >= 0) & (local < columns)
    return torch.where(here, z.gather(-1, local.clamp(0, columns)[:, None])[:, 0], otherwise)
