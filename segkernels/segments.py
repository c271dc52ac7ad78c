"""Segment boundaries: where the entropy of the next token says that a new phrase begins."""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import choose
from .boundaries import EntropyOf, boundaries_of
from .layout import check_bools, check_floats, constants, layout_of
from .native import empty, operator
from .native import segments as native


def segment_ends(
    entropy: Tensor,
    mask: Tensor,
    threshold: float,
    *,
    cu_seqlens: Tensor | None = None,
    entropy_of: EntropyOf = "next",
    exclude_last: bool | Tensor = True,
    backend: str | None = None,
) -> Tensor:
    """Marks the last token of every segment.

    Token i starts a new segment when the distribution that it is drawn from has an entropy over
    ``threshold``. With a row's action tokens a_0 .. a_{m-1} and b_i the entropy of the distribution
    of a_{i+1}::

        exclude_last=True:   ends = {a_i, i <= m-2 : b_i > threshold} + {a_{m-2}}
        exclude_last=False:  ends = {a_i, i <= m-1 : b_i > threshold} + {a_{m-1}}

    ``exclude_last=True`` leaves a_{m-1}, usually the EOS token, in no segment. A row with one
    action token is one segment whatever ``exclude_last`` says; a row with none has no end.

    Source: arXiv 2501.02790, reward model training.

    Args:
        entropy: nats, float ``[N, T]``, or ``[T]`` with ``cu_seqlens``. Read at action tokens only.
        mask: bool like ``entropy``, True at action tokens.
        threshold: nats. The comparison is strict and in fp32, for fp64 entropies too. ``-inf``
            makes every token a segment; ``inf`` with ``exclude_last=False`` makes the row one.
        cu_seqlens: int32 ``[N + 1]``, rows of a flat stream.
        entropy_of: ``"next"`` when ``entropy[t]`` belongs to ``logits[t]``, the distribution of
            the token after t; ``"current"`` when it is that of the distribution which produced t
            (response tensors of verl and TRL). In the latter form the entropy of a row's first
            action token decides nothing and is not read.
        exclude_last: one bool, or bool ``[N]``: False for a response that was cut off before EOS.
        backend: see ``segkernels.backend``.

    Returns:
        bool like ``mask``; False outside it. Not differentiable.

    Raises:
        ValueError: shapes that disagree; a NaN threshold; NaN entropy at an action token that is
            read (CPU tensors, or SEGKERNELS_DEBUG=1), with its row and position.
        TypeError: dtypes that disagree.
    """
    layout = layout_of("entropy", entropy, cu_seqlens)
    check_floats("entropy", entropy)
    check_bools("mask", mask, "entropy", entropy)
    boundaries = boundaries_of(entropy, layout, threshold, entropy_of, exclude_last)
    (entropy,) = constants(entropy)
    if choose("segment_ends", entropy, backend=backend) == "reference":
        from .reference import segments as reference

        return reference.segment_ends(entropy, mask, layout, boundaries)
    return native.segment_ends_fwd(
        entropy.contiguous(), mask.contiguous(), layout.cu_seqlens, *boundaries
    )


def segment_offsets(
    ends: Tensor,
    mask: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Segments as offsets, for tables and pictures on the host; synchronises a GPU.

    Inside torch.compile the number of segments is a size that only running the graph tells.

    Number the action tokens that lie in a segment, in storage order: 0, 1, 2 and so on. Segment s
    is numbers ``seg_offsets[s]`` to ``seg_offsets[s + 1]``, and row n has the segments
    ``row_offsets[n]`` to ``row_offsets[n + 1]``. So ``seg_offsets.diff()`` is the number of tokens
    in each segment and ``row_offsets.diff()`` the number of segments in each row.

    Action tokens behind the last end of their row (an excluded EOS, or every token of a row without
    an end) lie in no segment and get no number. They are the last of their row, so the segments of
    a row are consecutive pieces of its action tokens, from the first on::

        of_row = seg_offsets[row_offsets[n] : row_offsets[n + 1] + 1]
        pieces = [row_actions[i:j] for i, j in (of_row - of_row[0]).unfold(0, 2, 1)]

    Args:
        ends: bool ``[N, T]``, or ``[T]`` with ``cu_seqlens``, from ``segment_ends``.
        mask: bool like ``ends``, True at action tokens.
        cu_seqlens: int32 ``[N + 1]``, rows of a flat stream.
        backend: ``"reference"`` is the only one.

    Returns:
        int64 ``seg_offsets [S + 1]`` and ``row_offsets [N + 1]`` for S segments in N rows; both
        start with 0.

    Raises:
        ValueError: shapes that disagree.
        TypeError: dtypes that disagree.
    """
    layout = layout_of("ends", ends, cu_seqlens)
    check_bools("ends", ends, "ends", ends)
    check_bools("mask", mask, "ends", ends)
    choose("segment_offsets", ends, backend=backend)
    return _segment_offsets(ends, mask, layout.cu_seqlens)


@operator
def _segment_offsets(
    ends: Tensor, mask: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    from .reference import segments as reference

    return reference.segment_offsets(ends, mask, layout_of("ends", ends, cu_seqlens))


@torch.library.register_fake(_segment_offsets)
def _(ends, mask, cu_seqlens):
    segments_and_one = torch.library.get_ctx().new_dynamic_size(min=1)
    rows_and_one = layout_of("ends", ends, cu_seqlens).n_rows + 1
    sizes = segments_and_one, rows_and_one
    return tuple(empty(ends, size, dtype=torch.int64) for size in sizes)


def segment_positions(ends: Tensor, mask: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
    """Relative position p = (k + 1) / K of every segment, in the order of ``rewards[ends & mask]``.

    ends, mask: bool ``[N, T]``, or ``[T]`` with cu_seqlens. Returns fp64 ``[S]``, in (0, 1]; rows
    without segments give nothing. Reads sizes on the host, so it synchronises a GPU.
    """
    _, row_offsets = segment_offsets(ends, mask, cu_seqlens=cu_seqlens, backend="reference")
    in_row = row_offsets.diff()
    of_segment = in_row.repeat_interleave(in_row)
    first = row_offsets[:-1].repeat_interleave(in_row)
    k = torch.arange(len(first), device=first.device) - first
    return (k + 1).double() / of_segment
