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


def _load_cuda() -> tuple[Any, str]:
    if torch.version.hip is not None:
        return None, "torch's cuda devices are AMD GPUs here"
    module, absent = _load("_cuda")
    if module is None:
        build = "CMAKE_ARGS=-DSEGK_CUDA=ON pip install -e ."
        return None, f"{absent}; build it where nvcc is, with {build}"
    outdated = _outdated(*module.cuda_versions())
    return (None, outdated) if outdated else (module, "")


def _outdated(driver: int, runtime: int) -> str:
    """Why kernels built with this CUDA runtime cannot start under the driver; empty when they can.

    Versions as CUDA counts them, 1000 major + 10 minor. A driver runs what was built with any
    release of its own major version or an older one. 0: there is no driver, and no GPU to serve.
    """
    if driver == 0 or driver // 1000 >= runtime // 1000:
        return ""
    built, served = (f"{v // 1000}.{v % 1000 // 10}" for v in (runtime, driver))
    return (
        f"built with CUDA {built}, which the NVIDIA driver is too old for, it serves CUDA "
        f"{served}; install a driver for CUDA {runtime // 1000}, or build with an nvcc of CUDA "
        f"{driver // 1000}"
    )


extension, missing = _load_cpu()
cuda_extension, cuda_missing = _load_cuda()  # the CUDA kernels

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


class _Slope(torch.autograd.Function):
    """A gradient that has none itself, and says so."""

    @staticmethod
    def forward(op: str, slope: Callable, *args: Any) -> Any:
        return slope(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.op = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise no_second_derivative(ctx.op)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise no_second_derivative(ctx.op)


def no_second_derivative(op: str) -> RuntimeError:
    return RuntimeError(
        f"{op}: expected one derivative, got a second one, which its kernel does not have; "
        'pass backend="reference" to differentiate twice'
    )


def gradient(op: str, slope: Callable, *args: Any) -> Any:
    """``slope(*args)``, the gradient of ``op`` in its backward pass.

    Whoever differentiates the result once more gets an error with the op's name. What it costs is
    paid under ``create_graph=True`` alone, where gradients are recorded.
    """
    return _Slope.apply(op, slope, *args) if torch.is_grad_enabled() else slope(*args)


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


def executor(tensor: Tensor) -> tuple[int, int]:
    """The last argument of every sequence kernel: what it runs on, beside ``tensor``.

    On CPUs (number of threads, -1); on GPUs (address of the current stream, index of the device).
    """
    if on_gpu(tensor):
        return torch.cuda.current_stream(tensor.device).cuda_stream, tensor.get_device()
    return threads(), -1


def scratch(tensor: Tensor) -> Tensor:
    """Memory for the kernels that sum over all rows of ``tensor``."""
    return empty(tensor, kernels(tensor).SCRATCH_BYTES, dtype=torch.uint8)
