"""Row statistics of vocabulary shards and their merge in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..vocab import empty_states, merged
from ._actions import accumulation_dtype
from .token_stats import put_rows, take_per_row, take_rows


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
    row_max = z.amax(-1)
    sum_exp, sum_exp_d = _sums(z, row_max.masked_fill(row_max == -torch.inf, 0), temperature)
    nowhere = torch.full_like(row_max, torch.inf)
    target = nowhere if targets is None else _at_target(z, targets - vocab_start, nowhere)
    states = torch.stack([row_max, sum_exp, sum_exp_d, target], -1).double()
    if mask is None:
        return states.view(*shape, 4)
    return empty_states(logits).masked_scatter(mask[..., None], states)


def logprobs_and_entropy(
    states: Tensor,
    logits: Tensor,
    targets: Tensor | None,
    vocab_start: int,
    temperature: float | Tensor,
    mask: Tensor | None,
) -> tuple[Tensor | None, Tensor]:
    shape = logits.shape[:-1]
    whole = take_rows(merged(states, temperature), shape, mask)
    z = _columns(logits, mask)
    targets, temperature = take_per_row(targets, temperature, shape, mask)
    row_max, sum_exp, sum_exp_d, target = whole.unbind(-1)
    # The other shards' parts are constants here: the gradient is that of this shard.
    sum_exp, sum_exp_d = (
        of_all + (own - own.detach())
        for of_all, own in zip(
            (sum_exp, sum_exp_d), _sums(z, row_max.to(z.dtype), temperature), strict=True
        )
    )
    entropy = (sum_exp.log() - sum_exp_d / sum_exp).to(z.dtype)
    if targets is None:
        return put_rows((None, entropy), shape, mask)
    target = _at_target(z, targets - vocab_start, target)
    logprobs = ((target - row_max) / temperature - sum_exp.log()).to(z.dtype)
    return put_rows((logprobs.masked_fill(targets < 0, 0), entropy), shape, mask)


def _columns(logits: Tensor, mask: Tensor | None) -> Tensor:
    """[A, V + 1] the rows that the mask keeps; the banned token at the end adds nothing, and is
    there for shards without any column."""
    rows = take_rows(logits, logits.shape[:-1], mask)
    return pad(rows.to(accumulation_dtype(logits)), (0, 1), value=-torch.inf)


def _sums(z: Tensor, row_max: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
    """Sums of exp(d) and of exp(d) d, d = (z - row_max) / temperature."""
    divisor = temperature.to(z.dtype)[:, None] if isinstance(temperature, Tensor) else temperature
    d = (z - row_max[:, None]) / divisor
    e = d.exp()
    return e.sum(-1), (e * d.masked_fill(d == -torch.inf, 0)).sum(-1)


def _at_target(z: Tensor, local: Tensor, otherwise: Tensor) -> Tensor:
    """[A] logits of the targets that lie in this shard, ``otherwise`` of those that do not."""
    columns = z.shape[-1] - 1
    here = (local >= 0) & (local < columns)
    return torch.where(here, z.gather(-1, local.clamp(0, columns)[:, None])[:, 0], otherwise)
