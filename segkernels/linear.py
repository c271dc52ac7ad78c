"""Entropy and log-probabilities straight from hidden states and the output projection."""

from __future__ import annotations

from operator import itemgetter

import torch
from torch import Tensor

from . import native, vocab
from .backend import choose, row_kernels
from .layout import each, values_may_be_checked
from .projection import (
    HiddenRows,
    Projection,
    Space,
    add_product,
    check_projection,
    check_workspace,
    parts_of,
    room_for_logits,
)
from .token_stats import (
    check_row_inputs,
    check_row_values,
    empty_stats,
    per_row,
)


def linear_logprobs_and_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    *,
    workspace: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor | None, Tensor]:
    """Log-probabilities and entropy of softmax((hidden weight^T + bias) / temperature).

    The same numbers as :func:`segkernels.logprobs_and_entropy` of the logits, which are computed
    tile by tile and again in the backward pass: four products. Where half of ``workspace`` holds
    all of them, they are kept for the backward pass, which makes three. Extra memory stays within
    ``workspace`` whatever the number of tokens and the vocabulary, the gradients apart; that of
    half-precision hidden states is summed in a float32 buffer of their shape, that of the weight
    rounded once.

    On CPUs everything is computed in float32. On GPUs the logits and their gradient are rounded to
    the dtype of ``hidden``, as they are where a model computes them; all sums are float32.

    The products are of the rows that count alone: those in the mask, in the backward pass those
    with an upstream gradient. On a GPU the host must wait for their number, in the backward pass
    and, with a mask, in the forward pass. While a CUDA graph is captured it cannot, and all rows
    take part.

    Args:
        hidden: last hidden states ``[..., D]``. float32, bfloat16 or float16, read as float32;
            float64 runs the reference.
        weight: output projection ``[V, D]``, same choice of dtypes.
        targets: integers of the leading shape, in [0, V) or -100, as in
            :func:`segkernels.logprobs_and_entropy`; None for the entropy alone.
        bias: ``[V]`` or None.
        temperature: positive; one float, or a tensor of one per row. No gradient flows to it.
        mask: bool of the leading shape; rows with False are not read, give 0 and get no gradient.
        workspace: bytes; None for 64 MiB on CPUs, 512 MiB on GPUs. More makes larger products.
            One row by one column is always computed, however small the workspace.
        backend: see ``segkernels.backend``.

    Returns:
        (logprobs or None, entropy), nats, float32 (float64 when an input is) of the leading shape;
        differentiable in ``hidden``, ``weight`` and ``bias``.

    Raises:
        ValueError: shapes or devices that disagree, a temperature that is not positive and finite,
            a target out of range (CPU tensors, or SEGKERNELS_DEBUG=1), a workspace of no byte.
        TypeError: dtypes that do not fit.

    Source: the entropy that cuts segments, arXiv 2501.02790, section 2.2.
    """
    check_projection(hidden, weight, bias)
    check_workspace(workspace)
    targets, scalar, temperatures = check_row_inputs(
        "hidden[..., 0]", hidden.select(-1, 0), targets, temperature, mask
    )
    name = choose("linear_logprobs_and_entropy", hidden, weight, bias, backend=backend)
    if name == "reference":
        from .reference import linear as reference

        if values_may_be_checked(hidden):
            check_row_values(weight.shape[0], targets, temperatures, mask)
        return reference.linear_logprobs_and_entropy(
            hidden, weight, targets, bias, per_row(scalar, temperatures), mask
        )
    needs_gradient = any(x is not None and x.requires_grad for x in (hidden, weight, bias))
    keep_logits = (
        torch.is_grad_enabled()
        and needs_gradient
        and room_for_logits(hidden, weight, workspace, name)
    )
    logprobs, entropy, *_ = linear_fwd(
        hidden,
        weight,
        targets,
        bias,
        scalar,
        *each(Tensor.float, temperatures),
        mask,
        keep_logits,
        workspace,
        name,
    )
    return (None if targets is None else logprobs), entropy


@torch.library.custom_op("segkernels::linear_logprobs_and_entropy_fwd", mutates_args=())
def linear_fwd(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor | None,
    bias: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    mask: Tensor | None,
    keep_logits: bool,
    workspace: int | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logprobs, entropy, their statistics, and the logits, each where its row of hidden is, with
    what ``Space.row_stride`` adds to it; none without ``keep_logits``."""
    if values_may_be_checked(hidden):
        check_row_values(weight.shape[0], targets, temperatures, mask)
    kernels = row_kernels(backend)
    space = Space.of(backend, workspace, hidden)
    rows = HiddenRows(hidden, mask, space.dtype)
    kept = native.empty(hidden, *_kept_shape(hidden, weight, keep_logits, space), dtype=space.dtype)
    if rows.index is not None:
        kept.zero_()
    space = space.beside(kept)
    height = space.height(rows)
    columns = space.columns(height, rows, weight)
    projection = Projection(weight, bias, space.dtype, columns)
    tile = native.empty(hidden, height, space.row_stride(columns), dtype=space.dtype)
    targets, temperatures = each(rows.take, targets, temperatures)
    logprobs, entropy, stats = empty_stats(torch.Size([rows.count]), targets, hidden)
    for block in parts_of(rows.count, height):
        x = rows.read(block)
        targets_b, temperatures_b, mask_b = each(
            itemgetter(block), targets, temperatures, rows.mask
        )
        states = native.empty(x, len(x), 4, dtype=torch.float64)
        for part, panel in projection.slices():
            if keep_logits and rows.index is None:
                logits = kept[block, part]
            else:
                logits = tile[: len(x), : len(panel)]
            projection.logits(x, part, panel, logits)
            if keep_logits and rows.index is not None:
                kept[:, part].index_copy_(0, rows.index[block], logits)
            tile_rows = vocab.Rows(logits, targets_b, temperature, temperatures_b, part.start)
            kernels.accumulate(tile_rows, mask_b, states)
        kernels.finish(
            tile_rows,
            mask_b,
            states,
            None if targets is None else logprobs[block],
            entropy[block],
            stats[block],
        )
    logprobs = logprobs if targets is None else rows.put(logprobs)
    return logprobs, rows.put(entropy), rows.put(stats), kept


def _kept_shape(hidden: Tensor, weight: Tensor, keep_logits: bool, space: Space) -> tuple[int, int]:
    rows = hidden.numel() // weight.shape[1]  # torch.Size.numel() would fix the sizes of a graph
    return rows if keep_logits else 0, space.row_stride(weight.shape[0])


@linear_fwd.register_fake
def _(
    hidden,
    weight,
    targets,
    bias,
    temperature,
    temperatures,
    mask,
    keep_logits,
    workspace,
    backend,
):
    space = Space.of(backend, workspace, hidden)
    kept = hidden.new_empty(_kept_shape(hidden, weight, keep_logits, space), dtype=space.dtype)
    return *empty_stats(hidden.shape[:-1], targets, hidden), kept


@torch.library.custom_op("segkernels::linear_logprobs_and_entropy_bwd", mutates_args=())
def linear_bwd(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor | None,
    bias: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    stats: Tensor,
    kept: Tensor,
    dlogprobs: Tensor | None,
    dentropy: Tensor | None,
    needs: list[bool],
    workspace: int | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients in hidden, weight and bias that ``needs`` names; the others have no element."""
    need_hidden, need_weight, need_bias = needs
    keep = stats.select(-1, 1) != 0
    has_gradient = torch.zeros_like(keep)
    if targets is not None and dlogprobs is not None:
        has_gradient |= (dlogprobs != 0) & (targets >= 0)
    if dentropy is not None:
        has_gradient |= dentropy != 0
    kernels = row_kernels(backend)
    space = Space.of(backend, workspace, hidden).beside(kept)
    rows = HiddenRows(hidden, keep & has_gradient, space.dtype)
    height = space.height(rows)
    # Every slice of dweight is rounded once: by its one product, or from a float32 sum.
    one_product = rows.count <= height and weight.dtype == space.dtype
    sums_apart = need_weight and not one_product and weight.dtype != torch.float32
    columns = space.columns(height, rows, weight, sums_apart)
    projection = Projection(weight, bias, space.dtype, columns)
    tile = native.empty(hidden, height, space.row_stride(columns), dtype=space.dtype)
    per_row = each(rows.take, targets, temperatures, stats, dlogprobs, dentropy)

    dhidden = native.empty(hidden, keep.numel() if need_hidden else 0, hidden.shape[-1])
    dweight = native.empty(weight, *weight.shape if need_weight else (0,), dtype=weight.dtype)
    dbias = native.empty(hidden, weight.shape[0] if need_bias else 0).zero_()
    sums = projection.scratch(torch.float32) if sums_apart else None
    for part, panel in projection.slices():
        dw = dweight[part] if sums is None else sums[: len(panel)]
        for block in parts_of(rows.count, height):
            x = rows.read(block)
            gradient = tile[: len(x), : len(panel)]
            logits = gradient
            if not len(kept):
                projection.logits(x, part, panel, logits)
            elif rows.index is None:
                logits = kept[block, part]
            else:
                torch.index_select(kept[:, part], 0, rows.index[block], out=logits)
            targets, temperatures, *upstream = each(itemgetter(block), *per_row)
            tile_rows = vocab.Rows(logits, targets, temperature, temperatures, part.start)
            kernels.backward(tile_rows, *upstream, gradient)
            if need_hidden:
                add_product(dhidden[block], gradient, panel, start=part.start == 0)
            if need_weight:
                add_product(dw, gradient.t(), x, start=block.start == 0)
            if need_bias:
                dbias[part] += gradient.sum(0, dtype=torch.float32)
        if sums is not None:
            dweight[part] = dw
    if not rows.count:
        dweight.zero_()
    if need_hidden:
        rows.scatter(dhidden, height)
    return (
        dhidden.view(hidden.shape if need_hidden else 0).to(hidden.dtype),
        dweight,
        dbias.to(hidden.dtype if bias is None else bias.dtype),
    )


@linear_bwd.register_fake
def _(
    hidden,
    weight,
    targets,
    bias,
    temperature,
    temperatures,
    stats,
    kept,
    dlogprobs,
    dentropy,
    needs,
    *_,
):
    need_hidden, need_weight, need_bias = needs
    return (
        hidden.new_empty(hidden.shape if need_hidden else 0),
        weight.new_empty(weight.shape if need_weight else 0),
        (hidden if bias is None else bias).new_empty(weight.shape[0] if need_bias else 0),
    )


def _setup_context(ctx, inputs, output):
    hidden, weight, targets, bias, ctx.temperature, temperatures, _, _, *ctx.where = inputs
    ctx.save_for_backward(hidden, weight, targets, bias, temperatures, *output[2:])
    ctx.set_materialize_grads(False)


def _backward(ctx, dlogprobs, dentropy, *_):
    hidden, weight, targets, bias, temperatures, stats, kept = ctx.saved_tensors
    need_hidden, need_weight, _, need_bias, *_ = ctx.needs_input_grad
    dhidden, dweight, dbias = native.gradient(
        "linear_logprobs_and_entropy",
        linear_bwd,
        hidden,
        weight,
        targets,
        bias,
        ctx.temperature,
        temperatures,
        stats,
        kept,
        None if targets is None else dlogprobs,
        dentropy,
        [need_hidden, need_weight, need_bias],
        *ctx.where,
    )
    return (
        dhidden if need_hidden else None,
        dweight if need_weight else None,
        None,
        dbias if need_bias else None,
        *(None,) * 6,
    )


linear_fwd.register_autograd(_backward, setup_context=_setup_context)
