"""Token streams: which tokens form a row, and the checks that every op shares.

A stream is a grid ``[N, T]`` (each row a sequence, padding anywhere) or a flat ``[T]`` with
``cu_seqlens`` ``[N + 1]`` (int32; row n is tokens ``cu_seqlens[n]`` to ``cu_seqlens[n + 1]``).
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Layout:
    """Where the rows of one token stream lie."""

    shape: torch.Size
    n_rows: int
    cu_seqlens: Tensor | None  # [N + 1] int32, None for a grid

    @property
    def row_len(self) -> int:
        """T of a grid; 0 for a flat stream."""
        return self.shape[1] if self.cu_seqlens is None else 0

    @property
    def n_tokens(self) -> int:
        return self.shape.numel()

    def row_ids(self, device: torch.device) -> Tensor:
        """Row of every token, int64 ``[T]`` in storage order."""
        rows = torch.arange(self.n_rows, device=device)
        if self.cu_seqlens is None:
            return rows.repeat_interleave(self.row_len, output_size=self.n_tokens)
        return rows.repeat_interleave(self.cu_seqlens.diff().long(), output_size=self.n_tokens)

    def place(self, token: int) -> str:
        """Where a token of the flattened stream lies, for error messages."""
        if self.cu_seqlens is None:
            row, position = divmod(token, self.row_len)
        else:
            row = int((self.cu_seqlens <= token).sum()) - 1
            position = token - int(self.cu_seqlens[row])
        return f"row {row}, position {position}"


def values_may_be_checked(tensor: Tensor) -> bool:
    """Reading values costs a synchronisation on a GPU: there only with SEGKERNELS_DEBUG=1.

    Never while torch.compile traces, where there are no values; the custom operators check again
    when they run.
    """
    if torch.compiler.is_compiling():
        return False
    return tensor.device.type == "cpu" or os.environ.get("SEGKERNELS_DEBUG", "0") not in ("", "0")


def layout_of(name: str, tensor: Tensor, cu_seqlens: Tensor | None) -> Layout:
    """The layout of ``tensor``, an op's leading argument called ``name``.

    Raises ValueError or TypeError (what, expected, got, remedy) for a shape that is no stream and
    for a ``cu_seqlens`` that does not divide it.
    """
    if cu_seqlens is None:
        if tensor.dim() != 2:
            raise ValueError(
                f"{name}: expected shape [rows, tokens], got {list(tensor.shape)}; "
                "for a flat stream pass cu_seqlens=[0, ..., tokens]"
            )
        return Layout(tensor.shape, tensor.shape[0], None)
    if tensor.dim() != 1:
        raise ValueError(
            f"{name}: expected shape [tokens] because cu_seqlens is given, got "
            f"{list(tensor.shape)}; drop cu_seqlens for a grid, or flatten the tensor"
        )
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"cu_seqlens: expected int32, got {cu_seqlens.dtype}; pass cu_seqlens.int()"
        )
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() == 0:
        raise ValueError(
            f"cu_seqlens: expected shape [rows + 1], got {list(cu_seqlens.shape)}; "
            "it starts with 0 and ends with the number of tokens"
        )
    if cu_seqlens.device != tensor.device:
        raise ValueError(
            f"cu_seqlens: expected device {tensor.device} like {name}, got "
            f"{cu_seqlens.device}; move it with .to({name}.device)"
        )
    if tensor.shape[0] >= 2**31:
        raise ValueError(
            f"{name}: expected fewer than 2^31 tokens with cu_seqlens, got {tensor.shape[0]}; "
            "split the stream"
        )
    if values_may_be_checked(cu_seqlens):
        first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
        if first != 0 or last != tensor.shape[0]:
            raise ValueError(
                f"cu_seqlens: expected to run from 0 to {tensor.shape[0]} (the tokens of {name}), "
                f"got {first} to {last}; it must cover the stream exactly"
            )
        falls = (cu_seqlens.diff() < 0).nonzero()
        if falls.numel():
            row = int(falls[0, 0])
            raise ValueError(
                f"cu_seqlens: expected values that never decrease, got {int(cu_seqlens[row])} then "
                f"{int(cu_seqlens[row + 1])} at row {row}; pass cumulative sequence lengths"
            )
    return Layout(tensor.shape, cu_seqlens.shape[0] - 1, cu_seqlens.int().contiguous())


def check_floats(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATS:
        raise TypeError(
            f"{name}: expected float32, bfloat16, float16 or float64, got {tensor.dtype}; "
            f"pass {name}.float()"
        )


def check_device(name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(
            f"{name}: expected device {like.device} like {like_name}, got {tensor.device}; "
            f"move it with .to({like_name}.device)"
        )


def check_like(name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    """Same shape and device."""
    if tensor.shape != like.shape:
        raise ValueError(
            f"{name}: expected shape {list(like.shape)} like {like_name}, got "
            f"{list(tensor.shape)}; pass the {name} of the same token stream"
        )
    check_device(name, tensor, like_name, like)


def check_bools(name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    """A bool tensor of the same shape and device."""
    if tensor.dtype != torch.bool:
        raise TypeError(f"{name}: expected bool, got {tensor.dtype}; pass {name}.bool()")
    check_like(name, tensor, like_name, like)
