"""Token streams: which tokens form a row, and the checks that every op shares.

A stream is a grid ``[N, T]`` (each row a sequence, padding anywhere) or a flat ``[T]`` with
``cu_seqlens`` ``[N + 1]`` (int32; row n is tokens ``cu_seqlens[n]`` to ``cu_seqlens[n + 1]``).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Layout(NamedTuple):
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

    def check_rows(self) -> None:
        """``check_rows`` of this stream, before its rows are followed."""
        if self.cu_seqlens is not None:
            check_rows(self.cu_seqlens, self.n_tokens)

    def row_ids(self, device: torch.device) -> Tensor:
        """Row of every token, int64 ``[T]`` in storage order; raises as ``check_rows``."""
        self.check_rows()
        rows = torch.arange(self.n_rows, device=device)
        if self.cu_seqlens is None:
            return rows.repeat_interleave(self.row_len, output_size=self.n_tokens)
        return rows.repeat_interleave(self.cu_seqlens.diff().long(), output_size=self.n_tokens)

    def position(self, token: int) -> str:
        """Row and position where a token of the flattened stream lies, for error messages."""
        if self.cu_seqlens is None:
            row, position = divmod(token, self.row_len)
        else:
            row = int((self.cu_seqlens <= token).sum()) - 1
            position = token - int(self.cu_seqlens[row])
        return f"row {row}, position {position}"


def nan_entropy(layout: Layout, token: int) -> ValueError:
    return ValueError(
        f"entropy: expected numbers at action tokens, got NaN at {layout.position(token)}; look "
        "for NaN in the logits that it came from, or leave the token out of the mask"
    )


def check_rows(cu_seqlens: Tensor, n_tokens: int) -> None:
    """Raises ValueError for cu_seqlens that do not divide the stream, where values are read."""
    if not values_may_be_checked(cu_seqlens):
        return
    bounds = cu_seqlens.cpu().numpy()  # many times as quick as tensors of a few rows
    if bounds[0] != 0 or bounds[-1] != n_tokens:
        raise ValueError(
            f"cu_seqlens: expected to run from 0 to {n_tokens}, the number of tokens, got "
            f"{bounds[0]} to {bounds[-1]}; it must cover the stream exactly"
        )
    falls = bounds[1:] < bounds[:-1]
    if np.count_nonzero(falls):  # quicker than any()
        row = int(falls.argmax())
        raise ValueError(
            f"cu_seqlens: expected values that never decrease, got {bounds[row]} then "
            f"{bounds[row + 1]} at row {row}; pass cumulative sequence lengths"
        )


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

    Raises ValueError or TypeError (what, expected, got, remedy) for shapes, dtypes and devices that
    make no stream. The values of ``cu_seqlens`` are checked by ``check_rows``.
    """
    check_tensor(name, tensor)
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
    check_tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"cu_seqlens: expected int32, got {cu_seqlens.dtype}; pass cu_seqlens.int()"
        )
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() == 0:
        raise ValueError(
            f"cu_seqlens: expected shape [rows + 1], got {list(cu_seqlens.shape)}; "
            "it starts with 0 and ends with the number of tokens"
        )
    check_device("cu_seqlens", cu_seqlens, name, tensor)
    if tensor.shape[0] >= 2**31:
        raise ValueError(
            f"{name}: expected fewer than 2^31 tokens with cu_seqlens, got {tensor.shape[0]}; "
            "split the stream"
        )
    if cu_seqlens.dtype == torch.int64:  # what int32 cannot hold stays wrong instead of wrapping
        cu_seqlens = cu_seqlens.clamp(-1, 2**31 - 1).int()
    return Layout(tensor.shape, cu_seqlens.shape[0] - 1, cu_seqlens.contiguous())


def constants(*tensors: Tensor) -> list[Tensor]:
    """The tensors, cut off from the graph that computed them."""
    return [t.detach() if t.requires_grad else t for t in tensors]


def each(function: Callable[[Tensor], Tensor], *tensors: Tensor | None) -> list[Any]:
    """The function of every tensor, None of None."""
    return [None if t is None else function(t) for t in tensors]


def check_tensor(name: str, tensor: Tensor) -> None:
    """A tensor whose elements have addresses."""
    if not isinstance(tensor, Tensor):
        raise TypeError(
            f"{name}: expected a torch.Tensor, got {type(tensor).__name__}; convert it with "
            "torch.as_tensor"
        )
    if tensor.is_nested or tensor.layout != torch.strided:
        form = "a nested tensor" if tensor.is_nested else tensor.layout
        raise TypeError(
            f"{name}: expected a dense tensor, got {form}; pass a padded one, or a flat one with "
            "cu_seqlens"
        )


def check_floats(name: str, tensor: Tensor) -> None:
    check_tensor(name, tensor)
    if tensor.dtype not in FLOATS:
        raise TypeError(
            f"{name}: expected float32, bfloat16, float16 or float64, got {tensor.dtype}; "
            f"pass {name}.float()"
        )


def check_like(name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    """Same shape and device."""
    if tensor.shape != like.shape:
        raise ValueError(
            f"{name}: expected shape {list(like.shape)} like {like_name}, got "
            f"{list(tensor.shape)}; pass the {name} of the same token stream"
        )
    check_device(name, tensor, like_name, like)


def check_floats_like(name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    """A floating tensor of the same shape and device."""
    check_floats(name, tensor)
    check_like(name, tensor, like_name, like)


def check_device(name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(
            f"{name}: expected device {like.device} like {like_name}, got {tensor.device}; "
            f"move it with .to({like_name}.device)"
        )


def check_bools(name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    """A bool tensor of the same shape and device."""
    check_tensor(name, tensor)
    if tensor.dtype != torch.bool:
        raise TypeError(f"{name}: expected bool, got {tensor.dtype}; pass {name}.bool()")
    check_like(name, tensor, like_name, like)


def number(name: str, value: float) -> float:
    """``value`` as a float. Tensors of one element and numpy's numbers are numbers; text is not."""
    try:
        if not isinstance(value, str):
            return float(value)
    except (TypeError, ValueError, RuntimeError):
        pass
    raise TypeError(f"{name}: expected a number, got {type(value).__name__}; pass a float")


def check_coefficient(name: str, value: float) -> None:
    """The weight of a term: any finite number."""
    if not abs(number(name, value)) < float("inf"):
        raise ValueError(
            f"{name}: expected a finite number, got {value}; pass 0.0 to leave its term out"
        )
