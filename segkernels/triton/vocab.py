"""The kernels of ``segkernels.vocab`` in Triton.

A program reads a span of one row, block by block. Lane l of a block (one thread) takes UNROLL
vectors of 16 bytes, the first of them at column l * VEC, and keeps statistics of its own with one
maximum a block, so that nothing crosses threads before the span ends. Spans and lanes follow from
the column alone: neither the number of rows nor where they lie in memory shows in the results.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import native
from ..vocab import Rows

WARPS = 4
LANES = tl.constexpr(32 * WARPS)
# Vectors that a lane reads before it uses the first; the backward pass writes as many.
UNROLL = tl.constexpr(4)
UNROLL_BACKWARD = tl.constexpr(2)
# Bytes of logits that a program takes: so many that its start and end do not count, so few that the
# programs of a few rows still fill a GPU.
SPAN = 64 << 10
ROWS_FINISHED = tl.constexpr(128)

# Fused multiply-add is the default of Triton 3.6 but not of 3.9.
OPTIONS: dict[str, Any] = {"num_warps": WARPS, "enable_fp_fusion": True}

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2))
# Its exponential is 0 in fp32, and 0 times -150 is 0: what a logit of -inf adds.
LOWEST = tl.constexpr(-150.0)
MINUS_INFINITY = tl.constexpr(float("-inf"))


def _kernel(function: Any) -> Any:
    """Compiled once for each dtype and set of arguments, whatever the sizes and addresses."""
    names = [name for name in inspect.signature(function).parameters if not name.isupper()]
    return triton.jit(function, do_not_specialize=names, do_not_specialize_on_alignment=names)


@triton.jit
def _at_row(logits, row, inner, outer_stride, inner_stride, ALIGNED: tl.constexpr):
    logits += (row // inner).to(tl.int64) * outer_stride + (row % inner) * inner_stride
    if ALIGNED:
        logits = tl.multiple_of(logits, 16)
    return logits


@triton.jit
def _shifted(x, top, inverse):
    """d = (x - top) / temperature, exactly 0 at the top."""
    d = x - tl.where(top == MINUS_INFINITY, 0.0, top)  # -inf - -inf would be NaN
    if inverse is not None:
        d *= inverse
    return tl.maximum(d, LOWEST, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _exp(d):
    """e^d, one instruction's 2^x and the rounding error of x = d log2 e made good."""
    if d.dtype == tl.float64:
        e = tl.exp(d)
    else:
        x = d * LOG2E
        e = tl.exp2(x)
        e = tl.fma(e, tl.fma(x, -LN2, d), e)
    return e


@triton.jit
def _measured_from(top, old_top, total, weighted, inverse):
    """Sums of e^d and of e^d d, d being measured from ``top`` instead of a lower one."""
    lower = _shifted(old_top, top, inverse)
    factor = _exp(lower)
    return factor * total, factor * (weighted + total * lower)


@triton.jit
def _lane_sums(x, VEC: tl.constexpr):
    """[LANES] of x [LANES, VEC]. A reduction would add in an order that depends on the layout, and
    so on the alignment of the row."""
    for _ in tl.static_range(3 if VEC == 8 else 2):
        low, high = tl.split(tl.reshape(x, [LANES, x.shape[1] // 2, 2]))
        x = low + high
    return tl.reshape(x, [LANES])


@triton.jit
def _take(
    logits, block, end, top, total, weighted, inverse, VEC: tl.constexpr, VECTORS: tl.constexpr
):
    """Statistics [LANES] that include the block of VECTORS vectors a lane. One vector is masked."""
    columns = block + tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :]
    x = ()
    for i in tl.static_range(VECTORS):
        if VECTORS == 1:
            x += (tl.load(logits + columns, columns < end, MINUS_INFINITY),)
        else:
            x += (tl.load(logits + i * (LANES * VEC) + columns),)
    tops = x[0].to(tl.float32)
    for i in tl.static_range(1, VECTORS):
        tops = tl.maximum(tops, x[i].to(tl.float32))
    higher = tl.maximum(top, tl.max(tops, 1))
    total, weighted = _measured_from(higher, top, total, weighted, inverse)
    totals = tl.zeros([LANES, VEC], tl.float32)
    weighteds = tl.zeros([LANES, VEC], tl.float32)
    for i in tl.static_range(VECTORS):
        d = _shifted(x[i].to(tl.float32), higher[:, None], inverse)
        e = _exp(d)
        totals += e
        weighteds = tl.fma(e, d, weighteds)
    return higher, total + _lane_sums(totals, VEC), weighted + _lane_sums(weighteds, VEC)


@_kernel
def accumulate_kernel(
    logits,
    targets,
    temperatures,
    mask,
    states,
    inverse,
    inner: tl.int32,
    outer_stride: tl.int64,
    inner_stride: tl.int64,
    vocab: tl.int32,
    first: tl.int32,
    span: tl.int32,
    spans: tl.int32,
    VEC: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    program = tl.program_id(0)
    row = (program // spans).to(tl.int64)
    begin = tl.multiple_of(program % spans * span, VEC)
    end = tl.minimum(begin + span, vocab)
    live = True
    if mask is not None:
        live = tl.load(mask + row)
    if live:
        logits = _at_row(logits, program // spans, inner, outer_stride, inner_stride, ALIGNED)
        if temperatures is not None:
            inverse = tl.div_rn(1.0, tl.load(temperatures + row))
        tops = tl.full([LANES], MINUS_INFINITY, tl.float32)
        totals = tl.zeros([LANES], tl.float32)
        weighteds = tl.zeros([LANES], tl.float32)
        BLOCK: tl.constexpr = LANES * VEC * UNROLL
        whole = begin + (end - begin) // BLOCK * BLOCK
        for block in range(begin, whole, BLOCK):
            tops, totals, weighteds = _take(
                logits, block, end, tops, totals, weighteds, inverse, VEC, UNROLL
            )
        for block in range(whole, end, LANES * VEC):
            tops, totals, weighteds = _take(
                logits, block, end, tops, totals, weighteds, inverse, VEC, 1
            )

        top = tl.max(tops, 0)
        totals, weighteds = _measured_from(top, tops, totals, weighteds, inverse)
        total = tl.sum(totals.to(tl.float64), 0)
        weighted = tl.sum(weighteds.to(tl.float64), 0)
        at_target = tl.zeros((), tl.float64)
        if targets is not None:
            target = tl.load(targets + row) - first
            in_span = (target >= begin) & (target < end)
            at_target = tl.load(logits + target, in_span, 0.0).to(tl.float64)
        states += program.to(tl.int64) * 4
        if first > 0:
            old_top = tl.load(states).to(tl.float32)
            higher = tl.maximum(old_top, top)
            old_total, old_weighted = _measured_from(
                higher, old_top, tl.load(states + 1), tl.load(states + 2), inverse
            )
            total, weighted = _measured_from(higher, top, total, weighted, inverse)
            top = higher
            total += old_total
            weighted += old_weighted
            at_target += tl.load(states + 3)
        tl.store(states, top)
        tl.store(states + 1, total)
        tl.store(states + 2, weighted)
        tl.store(states + 3, at_target)


@_kernel
def finish_kernel(
    targets,
    temperatures,
    mask,
    states,
    logprobs,
    entropy,
    stats,
    temperature: tl.float64,
    rows: tl.int32,
    spans: tl.int32,
):
    row = tl.program_id(0).to(tl.int64) * ROWS_FINISHED + tl.arange(0, ROWS_FINISHED)
    within = row < rows
    live = within
    if mask is not None:
        live = live & tl.load(mask + row, within, False)
    if temperatures is not None:
        temperature = tl.load(temperatures + row, live, 1.0).to(tl.float64)
    inverse = 1.0 / temperature
    top = tl.full([ROWS_FINISHED], MINUS_INFINITY, tl.float64)
    total = tl.zeros([ROWS_FINISHED], tl.float64)
    weighted = tl.zeros([ROWS_FINISHED], tl.float64)
    at_target = tl.zeros([ROWS_FINISHED], tl.float64)
    for i in range(spans):
        state = states + (row * spans + i) * 4
        span_top = tl.load(state, live, MINUS_INFINITY)
        span_total = tl.load(state + 1, live, 0.0)
        span_weighted = tl.load(state + 2, live, 0.0)
        at_target += tl.load(state + 3, live, 0.0)
        higher = tl.maximum(top, span_top)
        total, weighted = _measured_from(higher, top, total, weighted, inverse)
        span_total, span_weighted = _measured_from(
            higher, span_top, span_total, span_weighted, inverse
        )
        top = higher
        total += span_total
        weighted += span_weighted
    # A row of -inf has an empty sum.
    total = tl.where(total > 0, total, float("nan"))
    log_total = tl.log(total)
    mean = weighted / total
    tl.store(entropy + row, tl.where(live, log_total - mean, 0.0), within)
    tl.store(stats + row * 3, tl.where(live, top, 0.0), within)
    tl.store(stats + row * 3 + 1, tl.where(live, 1 / total, 0.0), within)
    tl.store(stats + row * 3 + 2, tl.where(live, mean, 0.0), within)
    if logprobs is not None:
        has_target = live & (tl.load(targets + row, live, -1) >= 0)
        logprob = (at_target - top) * inverse - log_total
        tl.store(logprobs + row, tl.where(has_target, logprob, 0.0), within)


@triton.jit
def _put(
    logits,
    dlogits,
    block,
    end,
    top,
    inverse,
    constant,
    slope,
    target,
    at_target,
    HAS_TARGET: tl.constexpr,
    VEC: tl.constexpr,
    VECTORS: tl.constexpr,
):
    BLOCK: tl.constexpr = LANES * VEC * VECTORS
    columns = block + tl.arange(0, BLOCK)
    if VECTORS == 1:
        within = columns < end
        x = tl.load(logits + columns, within, MINUS_INFINITY)
    else:
        within = None
        x = tl.load(logits + columns)
    d = _shifted(x.to(tl.float32), top, inverse)
    dx = _exp(d) * (constant + slope * d)
    if HAS_TARGET:  # noqa: SIM102
        if (target >= block) & (target < block + BLOCK):
            dx += tl.where(columns == target, at_target, 0.0)
    tl.store(dlogits + columns, dx.to(x.dtype), within)


@_kernel
def backward_kernel(
    logits,
    targets,
    temperatures,
    stats,
    dlogprobs,
    dentropy,
    dlogits,
    inverse,
    inner: tl.int32,
    outer_stride: tl.int64,
    inner_stride: tl.int64,
    vocab: tl.int32,
    first: tl.int32,
    span: tl.int32,
    spans: tl.int32,
    VEC: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    program = tl.program_id(0)
    row = (program // spans).to(tl.int64)
    begin = tl.multiple_of(program % spans * span, VEC)
    end = tl.minimum(begin + span, vocab)
    dlogits += row * vocab
    if ALIGNED:
        dlogits = tl.multiple_of(dlogits, 16)
    BLOCK: tl.constexpr = LANES * VEC * UNROLL_BACKWARD
    whole = begin + (end - begin) // BLOCK * BLOCK

    inverse_sum = tl.load(stats + row * 3 + 1)
    target = -1
    dlogprob = 0.0
    dh = 0.0
    if dlogprobs is not None:
        target = tl.load(targets + row)
        dlogprob = tl.where(target >= 0, tl.load(dlogprobs + row), 0.0)
        target -= first
        target = tl.where((target >= begin) & (target < end), target, -1).to(tl.int32)
    if dentropy is not None:
        dh = tl.load(dentropy + row)
    if (inverse_sum == 0) | ((dlogprob == 0) & (dh == 0)):
        columns = tl.arange(0, BLOCK)
        zeros = tl.zeros([BLOCK], dlogits.dtype.element_ty)
        for block in range(begin, whole, BLOCK):
            tl.store(dlogits + block + columns, zeros)
        tl.store(dlogits + whole + columns, zeros, whole + columns < end)
    else:
        logits = _at_row(logits, program // spans, inner, outer_stride, inner_stride, ALIGNED)
        if temperatures is not None:
            inverse = tl.div_rn(1.0, tl.load(temperatures + row))
        top = tl.load(stats + row * 3)
        mean = tl.load(stats + row * 3 + 2)
        # dz = dlogprob [v = y] - p (dlogprob + dh (d - mean d)), and dlogits = dz / temperature.
        at_target = dlogprob
        slope = -inverse_sum * dh
        if inverse is not None:
            at_target *= inverse
            slope *= inverse
        constant = -inverse_sum * at_target - slope * mean
        for block in range(begin, whole, BLOCK):
            _put(
                logits,
                dlogits,
                block,
                end,
                top,
                inverse,
                constant,
                slope,
                target,
                at_target,
                dlogprobs is not None,
                VEC,
                UNROLL_BACKWARD,
            )
        for block in range(whole, end, LANES * VEC):
            _put(
                logits,
                dlogits,
                block,
                end,
                top,
                inverse,
                constant,
                slope,
                target,
                at_target,
                dlogprobs is not None,
                VEC,
                1,
            )


def _slices(rows: Rows, dlogits: Tensor | None = None) -> dict[str, Any]:
    """How the kernels find their columns."""
    inner, *strides = rows.strides
    plain = rows.temperatures is None and rows.temperature == 1
    size = rows.logits.itemsize
    bytes_apart = [stride * size for stride in strides]
    addresses = [rows.logits.data_ptr()]
    if dlogits is not None:
        bytes_apart.append(rows.logits.shape[-1] * size)
        addresses.append(dlogits.data_ptr())
    return {
        "inner": inner,
        "outer_stride": strides[0],
        "inner_stride": strides[1],
        "vocab": rows.logits.shape[-1],
        "first": rows.first,
        "inverse": None if plain else 1 / rows.temperature,
        "VEC": 16 // size,
        "ALIGNED": not any(n % 16 for n in (*bytes_apart, *addresses)),
    }


def _spans(rows: Rows) -> tuple[int, int]:
    """(columns that a program takes, programs that a row takes)."""
    span = SPAN // rows.logits.itemsize
    return span, triton.cdiv(rows.logits.shape[-1], span)


def _launch(kernel: Any, programs: int, like: Tensor, **arguments: Any) -> None:
    if programs:
        with torch.cuda.device_of(like):
            kernel[(programs,)](**arguments, **OPTIONS)


def forward(
    rows: Rows, mask: Tensor | None, logprobs: Tensor | None, entropy: Tensor, stats: Tensor
) -> None:
    """See ``segkernels.native.vocab``."""
    span, spans = _spans(rows)
    states = native.empty(rows.logits, rows.count, spans, 4, dtype=torch.float64)
    _accumulate(rows, mask, states, span, spans)
    _finish(rows, mask, states, logprobs, entropy, stats, spans)


def accumulate(rows: Rows, mask: Tensor | None, states: Tensor) -> None:
    """See ``segkernels.native.vocab``."""
    _accumulate(rows, mask, states, rows.logits.shape[-1], 1)


def _accumulate(rows: Rows, mask: Tensor | None, states: Tensor, span: int, spans: int) -> None:
    _launch(
        accumulate_kernel,
        rows.count * spans,
        rows.logits,
        logits=rows.logits,
        targets=rows.targets,
        temperatures=rows.temperatures,
        mask=mask,
        states=states,
        span=span,
        spans=spans,
        **_slices(rows),
    )


def finish(
    rows: Rows,
    mask: Tensor | None,
    states: Tensor,
    logprobs: Tensor | None,
    entropy: Tensor,
    stats: Tensor,
) -> None:
    """See ``segkernels.native.vocab``."""
    _finish(rows, mask, states, logprobs, entropy, stats, 1)


def _finish(
    rows: Rows,
    mask: Tensor | None,
    states: Tensor,
    logprobs: Tensor | None,
    entropy: Tensor,
    stats: Tensor,
    spans: int,
) -> None:
    _launch(
        finish_kernel,
        triton.cdiv(rows.count, ROWS_FINISHED.value),
        rows.logits,
        targets=rows.targets,
        temperatures=rows.temperatures,
        mask=mask,
        states=states,
        logprobs=logprobs,
        entropy=entropy,
        stats=stats,
        temperature=rows.temperature,
        rows=rows.count,
        spans=spans,
    )


def backward(
    rows: Rows,
    stats: Tensor,
    dlogprobs: Tensor | None,
    dentropy: Tensor | None,
    dlogits: Tensor,
) -> None:
    """See ``segkernels.native.vocab``."""
    span, spans = _spans(rows)
    _launch(
        backward_kernel,
        rows.count * spans,
        rows.logits,
        logits=rows.logits,
        targets=rows.targets,
        temperatures=rows.temperatures,
        stats=stats,
        dlogprobs=dlogprobs,
        dentropy=dentropy,
        dlogits=dlogits,
        span=span,
        spans=spans,
        **_slices(rows, dlogits),
    )
