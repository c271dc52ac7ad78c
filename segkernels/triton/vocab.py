"""The kernels of ``segkernels.vocab`` in Triton.

A program reads a span of one row, block by block. Lane l of a block (one thread) takes UNROLL
vectors of 16 bytes, the first of them at column l * VEC, and keeps statistics of its own with one
maximum a block, so that nothing crosses threads before the span ends. What fills no block is taken
in blocks of one vector a lane; the last columns of a row, where they fill no vector, are taken one
by one. All of that follows from the column alone: neither the number of rows nor where they lie in
memory shows in the results.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import native
from ..vocab import Rows, row_stride


@dataclass(frozen=True)
class Config:
    """How columns are shared out to threads. The last bits of the results depend on it, so the
    library runs the defaults for every size; only benchmarks pass others."""

    warps: int = 4
    # Vectors that a lane reads before it uses the first; the backward pass writes as many.
    unroll: int = 4
    unroll_backward: int = 2
    # Bytes of logits that a program takes, a multiple of 16: so many that its start and end do not
    # count, so few that the programs of a few rows still fill a GPU.
    span: int = 64 << 10


DEFAULTS = Config()
ROWS_FINISHED = tl.constexpr(128)

# Fused multiply-add is the default of Triton 3.6 but not of 3.9.
OPTIONS = {"enable_fp_fusion": True}

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
def _whole(begin, end, SIZE: tl.constexpr):
    """Where the last whole SIZE of columns [begin, end) ends."""
    return begin + (end - begin) // SIZE * SIZE


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
        low, high = tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))
        x = low + high
    return tl.reshape(x, [x.shape[0]])


@triton.jit
def _take(
    logits, block, end, top, total, weighted, inverse, VEC: tl.constexpr, VECTORS: tl.constexpr
):
    """Statistics [LANES] that include the block of VECTORS vectors a lane. It is a whole one if
    ``end`` is None, else one of one vector a lane."""
    LANES: tl.constexpr = top.shape[0]
    columns = block + tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :]
    x = ()
    for i in tl.static_range(VECTORS):
        if end is None:
            x += (tl.load(logits + i * (LANES * VEC) + columns),)
        else:
            x += (tl.load(logits + columns, columns < end, MINUS_INFINITY),)
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
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
    VEC: tl.constexpr,
    ALIGNED: tl.constexpr,
    EVEN: tl.constexpr,
):
    program = tl.program_id(0)
    row = (program // spans).to(tl.int64)
    begin = tl.multiple_of(program % spans * span, VEC)
    end = tl.minimum(begin + span, vocab)
    if EVEN:
        end = tl.multiple_of(end, VEC)
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
        blocks_end = _whole(begin, end, BLOCK)
        vectors_end = end if EVEN else _whole(begin, end, VEC)
        for block in range(begin, blocks_end, BLOCK):
            tops, totals, weighteds = _take(
                logits, block, None, tops, totals, weighteds, inverse, VEC, UNROLL
            )
        if not EVEN:
            columns = vectors_end + tl.arange(0, VEC)
            rest = tl.load(logits + columns, columns < end, MINUS_INFINITY).to(tl.float32)
        for block in range(blocks_end, vectors_end, LANES * VEC):
            tops, totals, weighteds = _take(
                logits, block, vectors_end, tops, totals, weighteds, inverse, VEC, 1
            )

        top = tl.max(tops, 0)
        if not EVEN:
            top = tl.maximum(top, tl.max(rest, 0))
        totals, weighteds = _measured_from(top, tops, totals, weighteds, inverse)
        total = tl.sum(totals.to(tl.float64), 0)
        weighted = tl.sum(weighteds.to(tl.float64), 0)
        if not EVEN:
            d = _shifted(rest, top, inverse)
            e = _exp(d)
            total += tl.sum(e.to(tl.float64), 0)
            weighted += tl.sum((e * d).to(tl.float64), 0)
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
    BLOCK: tl.constexpr,
):
    """The gradient of a block of BLOCK columns, of those before ``end`` unless that is None."""
    columns = block + tl.arange(0, BLOCK)
    within = None if end is None else columns < end
    x = tl.load(logits + columns, within)
    d = _shifted(x.to(tl.float32), top, inverse)
    dx = _exp(d) * (constant + slope * d)
    if HAS_TARGET:  # noqa: SIM102
        if (target >= block) & (target < block + BLOCK):
            dx += tl.where(columns == target, at_target, 0.0)
    tl.store(dlogits + columns, dx.to(x.dtype), within)


@triton.jit
def _clear(dlogits, block, end, BLOCK: tl.constexpr):
    """Zeros, where ``_put`` puts gradients."""
    columns = block + tl.arange(0, BLOCK)
    within = None if end is None else columns < end
    tl.store(dlogits + columns, tl.zeros([BLOCK], dlogits.dtype.element_ty), within)


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
    dlogits_stride: tl.int64,
    vocab: tl.int32,
    first: tl.int32,
    span: tl.int32,
    spans: tl.int32,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
    VEC: tl.constexpr,
    ALIGNED: tl.constexpr,
    EVEN: tl.constexpr,
):
    program = tl.program_id(0)
    row = (program // spans).to(tl.int64)
    begin = tl.multiple_of(program % spans * span, VEC)
    end = tl.minimum(begin + span, vocab)
    if EVEN:
        end = tl.multiple_of(end, VEC)
    dlogits += row * dlogits_stride
    if ALIGNED:
        dlogits = tl.multiple_of(dlogits, 16)
    BLOCK: tl.constexpr = LANES * VEC * UNROLL
    blocks_end = _whole(begin, end, BLOCK)
    vectors_end = end if EVEN else _whole(begin, end, VEC)

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
        for block in range(begin, blocks_end, BLOCK):
            _clear(dlogits, block, None, BLOCK)
        _clear(dlogits, blocks_end, vectors_end, BLOCK)
        if not EVEN:
            _clear(dlogits, vectors_end, end, VEC)
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
        for block in range(begin, blocks_end, BLOCK):
            _put(
                logits,
                dlogits,
                block,
                None,
                top,
                inverse,
                constant,
                slope,
                target,
                at_target,
                dlogprobs is not None,
                BLOCK,
            )
        for block in range(blocks_end, vectors_end, LANES * VEC):
            _put(
                logits,
                dlogits,
                block,
                vectors_end,
                top,
                inverse,
                constant,
                slope,
                target,
                at_target,
                dlogprobs is not None,
                LANES * VEC,
            )
        if not EVEN:
            _put(
                logits,
                dlogits,
                vectors_end,
                end,
                top,
                inverse,
                constant,
                slope,
                target,
                at_target,
                dlogprobs is not None,
                VEC,
            )


def _slices(rows: Rows, config: Config, dlogits: Tensor | None = None) -> dict[str, Any]:
    """How the kernels find their columns."""
    inner, *strides = rows.strides
    vocab, size = rows.logits.shape[-1], rows.logits.itemsize
    plain = rows.temperatures is None and rows.temperature == 1
    arguments = {"inner": inner, "outer_stride": strides[0], "inner_stride": strides[1]}
    addresses = [rows.logits.data_ptr()]
    if dlogits is not None:
        arguments["dlogits_stride"] = row_stride(dlogits)
        strides.append(arguments["dlogits_stride"])
        addresses.append(dlogits.data_ptr())
    aligned = not any(n % 16 for n in (*(stride * size for stride in strides), *addresses))
    return arguments | {
        "vocab": vocab,
        "first": rows.first,
        "inverse": None if plain else 1 / rows.temperature,
        "num_warps": config.warps,
        "LANES": 32 * config.warps,
        "VEC": 16 // size,
        "ALIGNED": aligned,
        "EVEN": aligned and vocab * size % 16 == 0,
    }


def _spans(rows: Rows, config: Config) -> tuple[int, int]:
    """(columns that a program takes, programs that a row takes)."""
    span = config.span // rows.logits.itemsize
    return span, triton.cdiv(rows.logits.shape[-1], span)


def _launch(kernel: Any, programs: int, like: Tensor, **arguments: Any) -> None:
    if programs:
        with torch.cuda.device_of(like):
            kernel[(programs,)](**arguments, **OPTIONS)


def forward(
    rows: Rows,
    mask: Tensor | None,
    logprobs: Tensor | None,
    entropy: Tensor,
    stats: Tensor,
    config: Config = DEFAULTS,
) -> None:
    """See ``segkernels.native.vocab``."""
    span, spans = _spans(rows, config)
    states = native.empty(rows.logits, rows.count, spans, 4, dtype=torch.float64)
    _accumulate(rows, mask, states, span, spans, config)
    _finish(rows, mask, states, logprobs, entropy, stats, spans)


def accumulate(rows: Rows, mask: Tensor | None, states: Tensor, config: Config = DEFAULTS) -> None:
    """See ``segkernels.native.vocab``."""
    _accumulate(rows, mask, states, rows.logits.shape[-1], 1, config)


def _accumulate(
    rows: Rows, mask: Tensor | None, states: Tensor, span: int, spans: int, config: Config
) -> None:
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
        UNROLL=config.unroll,
        **_slices(rows, config),
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
        num_warps=ROWS_FINISHED.value // 32,
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
    config: Config = DEFAULTS,
) -> None:
    """See ``segkernels.native.vocab``. The rows of dlogits may be further apart than V columns."""
    span, spans = _spans(rows, config)
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
        UNROLL=config.unroll_backward,
        **_slices(rows, config, dlogits),
    )
