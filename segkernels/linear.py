"""Entropy and log-probabilities straight from hidden states and the output projection."""

from __future__ import annotations

from collections.abc import Iterator
from operator import itemgetter

import torch
from torch import Tensor

from . import native, vocab
from .backend import choose
from .layout import check_floats, values_may_be_checked
from .reference import linear as reference
from .token_stats import (
    check_row_inputs,
    check_row_values,
    each,
    empty_stats,
    per_row,
)

# Bytes of one fp32 working buffer. The backward pass holds at most four: hidden states, a panel of
# the weight and its gradient, and half a one each for a tile of logits and for widening. The rest
# of the 64 MiB is left to the few numbers per token and to the buffers of the matrix product.
BUFFER = 12 << 20
TILE = BUFFER // 2


def linear_logprobs_and_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor | None, Tensor]:
    """Log-probabilities and entropy of softmax((hidden weight^T + bias) / temperature).

    The same numbers as :func:`segkernels.logprobs_and_entropy` of the logits, which are never held:
    the native implementation computes them tile by tile, and again in the backward pass. Its extra
    memory stays below 64 MiB whatever the number of tokens and the vocabulary, the gradients apart;
    that of half-precision hidden states is summed in a float32 buffer of their shape.

    Args:
        hidden: last hidden states ``[..., D]``. float32, bfloat16 or float16, read as float32;
            float64 runs the reference.
        weight: output projection ``[V, D]``, same choice of dtypes.
        targets: integers of the leading shape, in [0, V) or -100, as in
            :func:`segkernels.logprobs_and_entropy`; None for the entropy alone.
        bias: ``[V]`` or None.
        temperature: positive; one float, or a tensor of one per row. No gradient flows to it.
        mask: bool of the leading shape; rows with False are not read, give 0 and get no gradient.
            They and rows without an upstream gradient take no part in the products.
        backend: see ``segkernels.backend``.

    Returns:
        (logprobs or None, entropy), nats, float32 (float64 when an input is) of the leading shape;
        differentiable in ``hidden``, ``weight`` and ``bias``.

    Raises:
        ValueError: shapes or devices that disagree, a temperature that is not positive and finite,
            a target out of range (CPU tensors, or SEGKERNELS_DEBUG=1).
        TypeError: dtypes that do not fit.

    Source: the entropy that cuts segments, arXiv 2501.02790, section 2.2.
    """
    check_projection(hidden, weight, bias)
    targets, scalar, temperatures = check_row_inputs(
        "hidden[..., 0]", hidden.select(-1, 0), targets, temperature, mask
    )
    name = choose("linear_logprobs_and_entropy", hidden, weight, bias, backend=backend)
    if name == "reference":
        if values_may_be_checked(hidden):
            check_row_values(weight.shape[0], targets, temperatures, mask)
        return reference.linear_logprobs_and_entropy(
            hidden, weight, targets, bias, per_row(scalar, temperatures), mask
        )
    logprobs, entropy, _ = _linear_fwd(
        hidden, weight, targets, bias, scalar, *each(Tensor.float, temperatures), mask
    )
    return (None if targets is None else logprobs), entropy


def check_projection(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_floats("hidden", hidden)
    check_floats("weight", weight)
    if hidden.dim() == 0 or hidden.shape[-1] == 0:
        raise ValueError(
            f"hidden: expected shape [..., hidden size], got {list(hidden.shape)}; "
            "pass the last hidden state of every token"
        )
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight: expected shape [vocabulary, {hidden.shape[-1]}] to fit hidden, got "
            f"{list(weight.shape)}; pass lm_head.weight"
        )
    if weight.device != hidden.device:
        raise ValueError(
            f"weight: expected device {hidden.device} like hidden, got {weight.device}; "
            "move it with .to(hidden.device)"
        )
    if bias is None:
        return
    check_floats("bias", bias)
    if bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias: expected shape {list(weight.shape[:1])} to fit weight, got "
            f"{list(bias.shape)}; pass lm_head.bias, or None"
        )
    if bias.device != hidden.device:
        raise ValueError(
            f"bias: expected device {hidden.device} like hidden, got {bias.device}; "
            "move it with .to(hidden.device)"
        )


class _Rows:
    """The rows of hidden [..., D] that take part, in fp32 blocks of at most one buffer."""

    def __init__(self, hidden: Tensor, keep: Tensor | None):
        self.shape = hidden.shape[:-1]
        self.hidden = hidden if hidden.dim() > 1 else hidden[None]
        if keep is None:
            keep = torch.ones(self.shape, dtype=torch.bool, device="cpu")
        in_place = hidden.is_contiguous() and bool(keep.all())
        self.keep = keep.reshape(-1)
        self.index = None if in_place else self.keep.nonzero().squeeze(1)
        self.count = keep.numel() if self.index is None else self.index.numel()
        most = max(1, BUFFER // (4 * hidden.shape[-1]))
        blocks = max(1, -(-self.count // most))
        self.size = max(1, -(-self.count // blocks))
        self.only = self._read(slice(self.count)) if blocks == 1 else None

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """(which of the rows, their hidden states [B, D])."""
        for block in self._ranges():
            yield block, self._read(block) if self.only is None else self.only

    def _ranges(self) -> list[slice]:
        starts = range(0, self.count, self.size)
        return [slice(begin, min(begin + self.size, self.count)) for begin in starts]

    def _read(self, block: slice) -> Tensor:
        if self.index is None:
            return self.hidden.view(-1, self.hidden.shape[-1])[block].float()
        at = torch.unravel_index(self.index[block], self.hidden.shape[:-1])
        return self.hidden[at].float()

    def take(self, values: Tensor) -> Tensor:
        """[count, *] of values [..., *] in the shape of hidden's rows, contiguous."""
        flat = values.reshape(-1, *values.shape[len(self.shape) :])
        return flat.contiguous() if self.index is None else flat[self.index]

    def put(self, values: Tensor) -> Tensor:
        """[..., *] of values [count, *] in the shape of hidden's rows, 0 for the other rows."""
        if self.index is not None:
            full = values.new_zeros(self.shape.numel(), *values.shape[1:])
            full[self.index] = values
            values = full
        return values.view(self.shape + values.shape[1:])

    def spread(self, out: Tensor) -> None:
        """Moves rows [0, count) of out [rows of hidden, *] to their places; the others get 0.

        In place: no row moves towards the front, so going from the last to the first overwrites
        none that has yet to move.
        """
        if self.index is None:
            return
        for block in reversed(self._ranges()):
            out[self.index[block]] = out[block].clone()
        out[~self.keep] = 0


class _Projection:
    """Vocabulary slices of the projection, and tiles of logits in memory that is used again."""

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: _Rows):
        columns, hidden_size = weight.shape
        most = max(1, min(BUFFER // (4 * hidden_size), TILE // (4 * rows.size), columns))
        slices = -(-columns // most)
        self.columns = -(-columns // slices)
        self.weight = weight
        self.bias = None if bias is None else bias.float()
        self.tile = native.empty(weight, rows.size * self.columns)
        self.panel = self.scratch() if weight.dtype != torch.float32 else None

    def scratch(self) -> Tensor:
        return native.empty(self.weight, self.columns, self.weight.shape[1])

    def slices(self) -> Iterator[tuple[slice, Tensor]]:
        """(columns, fp32 weight of them [C, D]); valid until the next."""
        total = self.weight.shape[0]
        for begin in range(0, total, self.columns):
            part = slice(begin, min(begin + self.columns, total))
            panel = self.weight[part]
            if self.panel is not None:
                panel = self.panel[: len(panel)].copy_(panel)
            yield part, panel

    def logits(self, x: Tensor, part: slice, panel: Tensor) -> Tensor:
        """[B, C], in the tile."""
        out = self.tile[: len(x) * len(panel)].view(len(x), len(panel))
        if self.bias is None:
            return torch.mm(x, panel.t(), out=out)
        return torch.addmm(self.bias[part], x, panel.t(), out=out)


@torch.library.custom_op("segkernels::linear_logprobs_and_entropy_fwd", mutates_args=())
def _linear_fwd(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor | None,
    bias: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    kernels = vocab.kernels("native")
    check_row_values(weight.shape[0], targets, temperatures, mask)
    rows = _Rows(hidden, mask)
    projection = _Projection(weight, bias, rows)
    targets, temperatures = each(rows.take, targets, temperatures)
    logprobs, entropy, stats = empty_stats(torch.Size([rows.count]), targets, hidden)
    for block, x in rows.blocks():
        targets_b, temperatures_b = each(itemgetter(block), targets, temperatures)
        states = native.empty(x, len(x), 4, dtype=torch.float64)
        for part, panel in projection.slices():
            tile = projection.logits(x, part, panel)
            tile_rows = vocab.Rows(tile, targets_b, temperature, temperatures_b, part.start)
            kernels.accumulate(tile_rows, None, states)
        kernels.finish(
            tile_rows,
            None,
            states,
            None if targets is None else logprobs[block],
            entropy[block],
            stats[block],
        )
    logprobs = logprobs if targets is None else rows.put(logprobs)
    return logprobs, rows.put(entropy), rows.put(stats)


@_linear_fwd.register_fake
def _(hidden, weight, targets, bias, temperature, temperatures, mask):
    return empty_stats(hidden.shape[:-1], targets, hidden)


@torch.library.custom_op("segkernels::linear_logprobs_and_entropy_bwd", mutates_args=())
def _linear_bwd(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor | None,
    bias: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    stats: Tensor,
    dlogprobs: Tensor | None,
    dentropy: Tensor | None,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients that are needed; the others have no element."""
    keep = stats.select(-1, 1) != 0
    has_gradient = torch.zeros_like(keep)
    if targets is not None and dlogprobs is not None:
        has_gradient |= (dlogprobs != 0) & (targets >= 0)
    if dentropy is not None:
        has_gradient |= dentropy != 0
    kernels = vocab.kernels("native")
    rows = _Rows(hidden, keep & has_gradient)
    projection = _Projection(weight, bias, rows)
    per_row = each(rows.take, targets, temperatures, stats, dlogprobs, dentropy)

    dhidden = native.empty(hidden, keep.numel() if need_hidden else 0, hidden.shape[-1]).zero_()
    allocate = torch.empty if rows.count else torch.zeros
    dweight = allocate(weight.shape if need_weight else 0, dtype=weight.dtype, device="cpu")
    dbias = native.empty(hidden, weight.shape[0] if need_bias else 0).zero_()
    dpanel = projection.scratch() if need_weight and weight.dtype != torch.float32 else None
    for part, panel in projection.slices():
        for block, x in rows.blocks():
            tile = projection.logits(x, part, panel)
            targets, temperatures, *upstream = each(itemgetter(block), *per_row)
            tile_rows = vocab.Rows(tile, targets, temperature, temperatures, part.start)
            kernels.backward(tile_rows, *upstream, tile)
            if need_weight:
                dw = dweight[part] if dpanel is None else dpanel[: len(panel)]
                torch.addmm(dw, tile.t(), x, beta=0 if block.start == 0 else 1, out=dw)
            if need_bias:
                dbias[part] += tile.sum(0)
            if need_hidden:
                torch.addmm(dhidden[block], tile, panel, out=dhidden[block])
        if dpanel is not None and rows.count:
            dweight[part] = dpanel[: len(panel)]
    if need_hidden:
        rows.spread(dhidden)
    return (
        dhidden.view(hidden.shape if need_hidden else 0).to(hidden.dtype),
        dweight,
        dbias.to(hidden.dtype if bias is None else bias.dtype),
    )


@_linear_bwd.register_fake
def _(
    hidden,
    weight,
    targets,
    bias,
    temperature,
    temperatures,
    stats,
    dlogprobs,
    dentropy,
    need_hidden,
    need_weight,
    need_bias,
):
    return (
        hidden.new_empty(hidden.shape if need_hidden else 0),
        weight.new_empty(weight.shape if need_weight else 0),
        (hidden if bias is None else bias).new_empty(weight.shape[0] if need_bias else 0),
    )


def _setup_context(ctx, inputs, output):
    hidden, weight, targets, bias, ctx.temperature, temperatures, _ = inputs
    ctx.save_for_backward(hidden, weight, targets, bias, temperatures, output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx, dlogprobs, dentropy, _):
    hidden, weight, targets, bias, temperatures, stats = ctx.saved_tensors
    need_hidden, need_weight, _, need_bias, *_ = ctx.needs_input_grad
    dhidden, dweight, dbias = _linear_bwd(
        hidden,
        weight,
        targets,
        bias,
        ctx.temperature,
        temperatures,
        stats,
        None if targets is None else dlogprobs,
        dentropy,
        need_hidden,
        need_weight,
        need_bias,
    )
    return (
        dhidden if need_hidden else None,
        dweight if need_weight else None,
        None,
        dbias if need_bias else None,
        None,
        None,
        None,
    )


_linear_fwd.register_autograd(_backward, setup_context=_setup_context)
