"""Loads the compiled extension and turns tensors into what crosses its boundary.

The extension knows nothing of torch: pointers, sizes and dtype codes go in, memory that the caller
allocated is filled.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .layout import Layout

extension: Any  # the module with the CPU kernels, or None
missing: str  # why there is no extension; empty when there is one
try:
    from . import _native as extension  # type: ignore[attr-defined,no-redef]

    missing = ""
except ImportError as error:
    extension = None
    missing = str(error)

# The same numbers as segk::DType in csrc/include/segk/dtype.h.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def ptr(tensor: Tensor | None) -> int:
    """Address of a contiguous tensor's first element; 0 for None."""
    if tensor is None:
        return 0
    assert tensor.is_contiguous()
    return tensor.data_ptr()


def floats(tensor: Tensor) -> tuple[int, int]:
    """(address, dtype code) of a contiguous floating tensor."""
    return ptr(tensor), DTYPES[tensor.dtype]


def empty(like: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Memory for a kernel to fill, beside ``like``, whatever torch's default dtype and device."""
    return torch.empty(shape, dtype=dtype, device=like.device)


def rows(layout: Layout) -> tuple[int, int, int]:
    """(rows, tokens per row of a grid, address of cu_seqlens or 0)."""
    return layout.n_rows, layout.row_len, ptr(layout.cu_seqlens)


def threads() -> int:
    """As many threads as torch uses itself."""
    return torch.get_num_threads()


def kernels(tensor: Tensor) -> Any:
    """The module whose kernels serve the device of ``tensor``."""
    return extension


def place(tensor: Tensor) -> int:
    """The last argument of every sequence kernel: on CPUs the number of threads."""
    return threads()
