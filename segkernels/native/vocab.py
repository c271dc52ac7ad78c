"""The four kernels over ``segkernels.vocab.Rows`` in the compiled extension."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import native
from ..vocab import Rows, row_stride


def _vocab_rows(rows: Rows) -> Any:
    """What the extension takes for rows; their tensors must outlive it."""
    inner, outer_stride, inner_stride = rows.strides
    return native.extension.VocabRows(
        logits=(rows.logits.data_ptr(), native.DTYPES[rows.logits.dtype]),
        count=rows.count,
        vocab=rows.logits.shape[-1],
        inner=inner,
        outer_stride=outer_stride,
        inner_stride=inner_stride,
        first=rows.first,
        targets=native.ptr(rows.targets),
        temperatures=native.ptr(rows.temperatures),
        temperature=rows.temperature,
    )


def forward(
    rows: Rows, mask: Tensor | None, logprobs: Tensor | None, entropy: Tensor, stats: Tensor
) -> None:
    """Fills logprobs [R] (None without targets), entropy [R] and stats [R, 3], all float32."""
    native.extension.vocab_forward(
        _vocab_rows(rows),
        native.ptr(mask),
        native.ptr(logprobs),
        native.ptr(entropy),
        native.ptr(stats),
        native.threads(),
    )


def accumulate(rows: Rows, mask: Tensor | None, states: Tensor) -> None:
    """Takes the columns of ``rows`` into states [R, 4] float64; those with first = 0 start them."""
    native.extension.vocab_accumulate(
        _vocab_rows(rows), native.ptr(mask), native.ptr(states), native.threads()
    )


def finish(
    rows: Rows,
    mask: Tensor | None,
    states: Tensor,
    logprobs: Tensor | None,
    entropy: Tensor,
    stats: Tensor,
) -> None:
    """What ``forward`` fills, from states that have seen every column."""
    native.extension.vocab_finish(
        _vocab_rows(rows),
        native.ptr(mask),
        native.ptr(states),
        native.ptr(logprobs),
        native.ptr(entropy),
        native.ptr(stats),
        native.threads(),
    )


def backward(
    rows: Rows,
    stats: Tensor,
    dlogprobs: Tensor | None,
    dentropy: Tensor | None,
    dlogits: Tensor,
) -> None:
    """Fills dlogits [R, V] of the logits' dtype, whose rows are equally far apart.

    dlogits may be the logits themselves.
    """
    native.extension.vocab_backward(
        _vocab_rows(rows),
        native.ptr(stats),
        native.ptr(dlogprobs),
        native.ptr(dentropy),
        dlogits.data_ptr(),
        row_stride(dlogits),
        native.threads(),
    )
