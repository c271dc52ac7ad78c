"""Loads the compiled extension and turns tensors into what crosses its boundary.

The extension knows nothing of torch: pointers, sizes and dtype codes go in, memory that the caller
allocated is filled.
"""

from __future__ import annotations

from collections.abc import Callable
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


_library = torch.library.Library("segkernels", "FRAGMENT")


def operator(body: Callable) -> torch._ops.OpOverload:
    """Registers ``body`` as ``torch.ops.segkernels.<its name>``, on all devices.

    Like torch.library.custom_op, whose wrappers in Python take longer than these kernels do.
    """
    name = body.__name__.lstrip("_")
    schema = torch.library.infer_schema(body, mutates_args=())
    # The kernels take addresses of contiguous tensors, so a compiler must not pick other strides.
    _library.define(name + schema, tags=(torch.Tag.needs_exact_strides,))
    _library.impl(name, body, "CompositeExplicitAutograd")
    return getattr(torch.ops.segkernels, name).default


def ptr(tensor: Tensor | None) -> int:
    """Address of a contiguous tensor's first element; 0 for None."""
    if tensor is None:
        return 0
    assert tensor.is_contiguous()
    return tensor.data_ptr()


def floats(tensor: Tensor) -> tuple[int, int]:
    """(address, dtype code) of a contiguous floating tensor."""
    return ptr(tensor), DTYPES[tensor.dtype]


def empty_like(like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Memory of the shape of a contiguous tensor for a kernel to fill."""
    return torch.empty_like(like, dtype=dtype)


def empty(like: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Memory for a kernel to fill, beside ``like``, whatever torch's default dtype and device."""
    return like.new_empty(shape, dtype=dtype)


def rows(layout: Layout) -> tuple[int, int, int]:
    """(rows, tokens per row of a grid, address of cu_seqlens or 0); raises as ``check_rows``."""
    layout.check_rows()
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
