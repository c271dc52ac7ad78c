"""The compiled extension: loads it, and turns tensors into what crosses its boundary.

The extension knows nothing of torch: pointers, sizes and dtype codes go in, memory that the caller
allocated is filled. It has a module for every instruction set of CPUs, of which the best that the
processor has is used (SEGKERNELS_ISA forces one), and, where it was built with nvcc, one for NVIDIA
GPUs with the same sequence ops. The files beside this one hold an op each: the custom operators
that call the kernels, their fakes and their autograd formulas.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..layout import check_rows


def _load(name: str) -> tuple[Any, str]:
    """(module, ""), or (None, why there is none)."""
    try:
        return importlib.import_module(f"..{name}", __package__), ""
    except ImportError as error:
        return None, str(error)


def _load_cpu() -> tuple[Any, str]:
    anywhere, missing = _load("_native")
    if anywhere is None:
        return None, missing
    isa = anywhere.chosen_isa()
    return (anywhere, "") if isa == "scalar" else _load(f"_native_{isa}")


extension, missing = _load_cpu()
cuda_extension, cuda_missing = _load("_cuda")  # the CUDA kernels
if torch.version.hip is not None:
    cuda_extension = None
    cuda_missing = "torch's cuda devices are AMD GPUs here"

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


def rows(like: Tensor, cu_seqlens: Tensor | None) -> tuple[int, int, int]:
    """(rows, tokens per row, address of cu_seqlens or 0) of a stream that ``layout_of`` accepted.

    Of a flat stream the mean of tokens per row, rounded up. Raises as ``check_rows``.
    """
    if cu_seqlens is None:
        return *like.shape, 0
    assert cu_seqlens.dtype == torch.int32
    check_rows(cu_seqlens, like.shape[0])
    count = cu_seqlens.shape[0] - 1
    return count, -(-like.shape[0] // max(count, 1)), ptr(cu_seqlens)


def threads() -> int:
    """As many threads as torch uses itself."""
    return torch.get_num_threads()


def on_gpu(tensor: Tensor) -> bool:
    """Whether the CUDA kernels serve ``tensor``, so that the host would have to wait for it."""
    return tensor.is_cuda


def kernels(tensor: Tensor) -> Any:
    """The module whose kernels serve the device of ``tensor``."""
    return cuda_extension if on_gpu(tensor) else extension


def threads_or_stream(tensor: Tensor) -> int:
    """The last argument of every sequence kernel: the number of threads, or the current stream."""
    return torch.cuda.current_stream(tensor.device).cuda_stream if on_gpu(tensor) else threads()


def scratch(tensor: Tensor) -> Tensor:
    """Memory for the kernels that sum over all rows of ``tensor``."""
    return empty(tensor, kernels(tensor).SCRATCH_BYTES, dtype=torch.uint8)
