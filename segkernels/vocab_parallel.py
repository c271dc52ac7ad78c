"""Entropy and log-probabilities of logits whose vocabulary is split over ranks.

Four numbers per token and shard take the place of the logits: they are gathered and merged on every
rank, so that one collective is all there is, in the forward pass alone.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from . import native, vocab
from .backend import choose, row_kernels
from .layout import (
    check_device,
    check_floats,
    check_tensor,
    constants,
    each,
    values_may_be_checked,
)
from .token_stats import (
    IGNORED,
    _token_stats_bwd,
    check_row_inputs,
    check_row_values,
    empty_stats,
    per_row,
)


def vocab_parallel_logprobs_and_entropy(
    logits: Tensor,
    targets: Tensor | None,
    vocab_start: int,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    backend: str | None = None,
) -> tuple[Tensor | None, Tensor]:
    """:func:`segkernels.logprobs_and_entropy` of logits whose columns are split over ranks.

    The same numbers and gradients as from the gathered logits, which nobody holds: every rank
    reads its own shard and receives 32 bytes per token from each of the others, in one all-gather.
    All ranks merge the same states in the same order, so that their results are bitwise equal.
    The backward pass does not communicate. It takes for granted that every rank computes the same
    loss from the results, hence passes the same upstream gradient, and gives each rank the whole
    gradient of its shard, as vocabulary-parallel cross entropies do.

    With Megatron's groups (``mpu``), and the columns that pad its vocabulary cut off::

        start = mpu.get_tensor_model_parallel_rank() * logits.shape[-1]
        logprobs, entropy = vocab_parallel_logprobs_and_entropy(
            logits[..., : max(0, vocab_size - start)],
            targets,
            start,
            group=mpu.get_tensor_model_parallel_group(),
        )

    Args:
        logits: this rank's columns ``[..., V_r]``, adjacent in the whole vocabulary. Shards may
            differ in size and may be empty. Dtypes as in :func:`segkernels.logprobs_and_entropy`.
        targets: token ids of the whole vocabulary or -100, the same on every rank; None for the
            entropy alone.
        vocab_start: id of the first token of this shard.
        temperature: as there, the same on every rank.
        mask: as there, the same on every rank.
        group: the ranks among which the vocabulary is split; None for all ranks. Without
            torch.distributed the shard is the whole vocabulary.
        backend: see ``segkernels.backend``.

    Returns:
        (logprobs or None, entropy) in nats, of the leading shape and differentiable in ``logits``.

    Raises:
        ValueError: as there. A target that is not in exactly one shard is out of range; where
            values are not checked, its log-probability is NaN if no shard has it.
        TypeError: dtypes that do not fit.
    """
    check_floats("logits", logits)
    shard = (targets, vocab_start, temperature, mask)
    states = vocab_shard_stats(logits.detach(), *shard, backend=backend)
    return merge_vocab_stats(_all_gather(states, group), logits, *shard, backend=backend)


def vocab_shard_stats(
    logits: Tensor,
    targets: Tensor | None,
    vocab_start: int,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """What :func:`merge_vocab_stats` needs to know of the columns of one vocabulary shard.

    For communication of your own: gather the states, then merge them on every rank. With
    d = (logit - max) / temperature over the columns of the shard, a state is::

        (max, sum_v exp d_v, sum_v exp(d_v) d_v, the target's logit)

    and (-inf, 0, 0, inf) is that of a shard with no column, or of a row with mask False; inf
    stands for the logit of a target that the shard does not hold.

    Args, errors: as in :func:`vocab_parallel_logprobs_and_entropy`.

    Returns:
        float64 ``[..., 4]``. No gradient flows through it: that is the merge's part.
    """
    targets, scalar, temperatures = _check_shard(logits, targets, vocab_start, temperature, mask)
    name = choose("vocab_shard_stats", logits, backend=backend)
    logits = logits.detach()
    if name == "reference":
        from .reference import vocab_parallel as reference

        if values_may_be_checked(logits):
            check_row_values(0, None, temperatures, mask)
        return reference.shard_stats(
            logits, targets, vocab_start, per_row(scalar, temperatures), mask
        )
    return _shard_stats(
        logits, targets, vocab_start, scalar, *each(Tensor.float, temperatures), mask, name
    )


def merge_vocab_stats(
    states: Tensor,
    logits: Tensor,
    targets: Tensor | None,
    vocab_start: int,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor | None, Tensor]:
    """Log-probabilities and entropy of whole rows from the states of their vocabulary shards.

    Args:
        states: ``[shards, ..., 4]``, what :func:`vocab_shard_stats` gave for every shard, in the
            same order on every rank.
        others: what this rank passed there. ``logits`` are read in the backward pass, which gives
            their gradient and leaves other shards to other ranks.
        backend: see ``segkernels.backend``.

    Returns, errors: as in :func:`vocab_parallel_logprobs_and_entropy`.
    """
    targets, scalar, temperatures = _check_shard(logits, targets, vocab_start, temperature, mask)
    _check_states(states, logits)
    (states,) = constants(states)
    name = choose("merge_vocab_stats", logits, backend=backend)
    if name == "reference":
        from .reference import vocab_parallel as reference

        if values_may_be_checked(logits):
            _check_values(states, targets, mask)
        return reference.logprobs_and_entropy(
            states, logits, targets, vocab_start, per_row(scalar, temperatures), mask
        )
    logprobs, entropy, _ = _merge_stats(
        states, logits, targets, vocab_start, scalar, *each(Tensor.float, temperatures), mask, name
    )
    return (None if targets is None else logprobs), entropy


def _all_gather(states: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[ranks, ..., 4].

    Not an all-reduce of the maxima and then one of the sums: it waits for the network once instead
    of twice, and copies arrive as they are, NaN included. What it moves more, 32 bytes per token
    and rank, is small beside the 2 V / ranks bytes that a rank reads of its logits.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return states[None]
    gathered = states.new_empty(dist.get_world_size(group), *states.shape)
    dist.all_gather(list(gathered), states, group=group)
    return gathered


def _check_shard(
    logits: Tensor,
    targets: Tensor | None,
    vocab_start: int,
    temperature: float | Tensor,
    mask: Tensor | None,
) -> tuple[Tensor | None, float, Tensor | None]:
    check_floats("logits", logits)
    if logits.dim() == 0:
        raise ValueError(
            "logits: expected shape [..., columns of this shard], got []; pass one row per token"
        )
    if not (isinstance(vocab_start, int) and vocab_start >= 0):
        raise ValueError(
            f"vocab_start: expected the id of this shard's first token, got {vocab_start!r}; "
            "pass the number of columns in the shards before it"
        )
    row = logits.new_empty(logits.shape[:-1])  # a shard may have no column to take it from
    return check_row_inputs("logits[..., 0]", row, targets, temperature, mask)


def _check_states(states: Tensor, logits: Tensor) -> None:
    check_tensor("states", states)
    if states.dtype != torch.float64:
        raise TypeError(
            f"states: expected float64, got {states.dtype}; pass what vocab_shard_stats gave"
        )
    if states.dim() == 0 or states.shape[0] == 0 or states.shape[1:] != (*logits.shape[:-1], 4):
        raise ValueError(
            f"states: expected shape {['shards', *logits.shape[:-1], 4]} to fit logits, got "
            f"{list(states.shape)}; stack what vocab_shard_stats gave for every shard"
        )
    check_device("states", states, "logits", logits)


def _check_values(states: Tensor, targets: Tensor | None, mask: Tensor | None) -> None:
    """Targets in exactly one shard or IGNORED, wherever the mask is True."""
    if targets is None:
        return
    holders = (states[..., 3] != torch.inf).sum(0)
    # A target whose own logit is inf is no error: the row has no distribution and gives NaN.
    bad = (targets != IGNORED) & (holders != 1) & ~states[..., 1].sum(0).isnan()
    bad = (bad if mask is None else bad & mask).nonzero()
    if len(bad):
        at = tuple(bad[0].tolist())
        raise ValueError(
            f"targets: expected {IGNORED} or the id of a token in exactly one shard, got "
            f"{int(targets[at])} at {list(at)}, which {int(holders[at])} of {len(states)} hold; "
            "pass ids of the whole vocabulary, and as vocab_start the first one of this shard"
        )


@torch.library.custom_op("segkernels::vocab_shard_stats", mutates_args=())
def _shard_stats(
    logits: Tensor,
    targets: Tensor | None,
    vocab_start: int,
    temperature: float,
    temperatures: Tensor | None,
    mask: Tensor | None,
    backend: str,
) -> Tensor:
    if values_may_be_checked(logits):
        check_row_values(0, None, temperatures, mask)
    temperatures, mask = each(Tensor.contiguous, temperatures, mask)
    states = vocab.empty_states(logits)
    columns = logits.shape[-1]
    if columns == 0:
        return states
    # Counted from the shard's own first column, where states start.
    local = None if targets is None else (targets - vocab_start).contiguous()
    rows = vocab.Rows(vocab.addressable(logits), local, temperature, temperatures)
    row_kernels(backend).accumulate(rows, mask, states)
    if local is None:
        states[..., 3] = torch.inf
    else:
        states[..., 3].masked_fill_((local < 0) | (local >= columns), torch.inf)
    return states


@_shard_stats.register_fake
def _(logits, targets, vocab_start, temperature, temperatures, mask, backend):
    return torch.empty(*logits.shape[:-1], 4, dtype=torch.float64, device=logits.device)


@torch.library.custom_op("segkernels::merge_vocab_stats", mutates_args=())
def _merge_stats(
    states: Tensor,
    logits: Tensor,
    targets: Tensor | None,
    vocab_start: int,
    temperature: float,
    temperatures: Tensor | None,
    mask: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if values_may_be_checked(logits):
        _check_values(states, targets, mask)
    targets, temperatures, mask = each(Tensor.contiguous, targets, temperatures, mask)
    whole = vocab.merged(states, per_row(temperature, temperatures))
    logprobs, entropy, stats = empty_stats(logits.shape[:-1], targets, logits)
    row_kernels(backend).finish(
        vocab.Rows(vocab.addressable(logits), targets, temperature, temperatures, vocab_start),
        mask,
        whole,
        None if targets is None else logprobs,
        entropy,
        stats,
    )
    return logprobs, entropy, stats


@_merge_stats.register_fake
def _(states, logits, targets, vocab_start, temperature, temperatures, mask, backend):
    return empty_stats(logits.shape[:-1], targets, logits)


def _setup_context(ctx, inputs, output):
    _, logits, targets, ctx.vocab_start, ctx.temperature, temperatures, _, ctx.backend = inputs
    ctx.save_for_backward(logits, targets, temperatures, output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx, dlogprobs, dentropy, _):
    logits, targets, temperatures, stats = ctx.saved_tensors
    dlogits = native.gradient(
        "merge_vocab_stats",
        _token_stats_bwd,
        logits,
        targets,
        ctx.temperature,
        temperatures,
        stats,
        None if targets is None else dlogprobs,
        dentropy,
        ctx.backend,
        ctx.vocab_start,
    )
    return None, dlogits, None, None, None, None, None, None


_merge_stats.register_autograd(_backward, setup_context=_setup_context)
