"""Which implementation runs: one table, one function.

``backend=`` of the call, else the environment variable ``SEGKERNELS_BACKEND``, else by device.
What was asked for and is not available raises with the reason; nothing falls back silently.
Triton kernels run on NVIDIA GPUs, and on CPUs under Triton's interpreter (``TRITON_INTERPRET=1``)
when they are asked for.

Kernels have the first derivative, in backward passes. Second derivatives and forward mode
(``torch.func.jvp``) are the reference's; a kernel that is asked for them raises with its op's name.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import warnings
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import native

NAMES = ("reference", "native", "triton")

# Devices that each backend of an op serves. The reference serves every op on every device.
DEVICES: dict[str, dict[str, tuple[str, ...]]] = {
    "entropy_from_logits": {"native": ("cpu",), "triton": ("cuda",)},
    "logprobs_and_entropy": {"native": ("cpu",), "triton": ("cuda",)},
    "linear_logprobs_and_entropy": {"native": ("cpu",), "triton": ("cuda",)},
    "vocab_shard_stats": {"native": ("cpu",), "triton": ("cuda",)},
    "merge_vocab_stats": {"native": ("cpu",), "triton": ("cuda",)},
    "segment_ends": {"native": ("cpu", "cuda")},
    "segment_offsets": {},
    "segment_scores": {"native": ("cpu", "cuda")},
    "segment_bradley_terry": {"native": ("cpu", "cuda")},
    "scatter_segment_rewards": {"native": ("cpu", "cuda")},
    "RunningLocationNormalizer": {"native": ("cpu", "cuda")},
    "gae": {"native": ("cpu", "cuda")},
    "segment_advantages": {"native": ("cpu", "cuda")},
    "segment_ends_and_advantages": {"native": ("cpu", "cuda")},
    "whiten": {"native": ("cpu", "cuda")},
    "policy_loss": {"native": ("cpu", "cuda")},
    "value_loss": {"native": ("cpu", "cuda")},
    "linear_policy_loss": {"native": ("cpu",), "triton": ("cuda",)},
}

# What these give is a constant of the graph; backward passes see it detached.
CONSTANT = (
    "vocab_shard_stats", "scatter_segment_rewards", "RunningLocationNormalizer", "gae",
    "segment_advantages", "segment_ends_and_advantages", "whiten",
)  # fmt: skip

# These give booleans and integers, which have no derivatives to lose.
DISCRETE = ("segment_ends", "segment_offsets")

# Modules with the four kernels over ``vocab.Rows``. Triton's is imported when it first runs.
ROW_KERNELS = {"native": ".native.vocab", "triton": ".triton.vocab"}

TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


class BackendError(RuntimeError):
    """The backend that was asked for cannot run this call; the message says why."""


class BackendWarning(UserWarning):
    """A slower implementation runs than the device could have."""


def _unserved(op: str, name: str, device: torch.device) -> str:
    """Why backend ``name`` of ``op`` is not for this device; empty when it is."""
    devices = DEVICES[op].get(name, ())
    if name == "triton" and devices and os.environ.get("TRITON_INTERPRET") == "1":
        devices = (*devices, "cpu")
    if device.type not in devices:
        served = " and ".join(devices) if devices else "no device"
        return f"its {name} implementation serves {served}, the tensors are on {device.type}"
    if device.type == "cuda" and torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(device)
        if torch.version.hip or gpu.major < 8:
            return f"its {name} implementation serves NVIDIA GPUs from sm_80 on, not {gpu.name}"
    return ""


def _refusal(op: str, name: str, device: torch.device, double: bool) -> str:
    """Why backend ``name`` cannot run ``op``; empty when it can."""
    if name == "reference":
        return ""
    unserved = _unserved(op, name, device)
    if unserved:
        return unserved
    if double:
        return f"its {name} implementation has no float64; the reference does"
    if name == "native" and device.type == "cpu" and native.extension is None:
        return (
            f"the compiled extension is missing ({native.missing}); "
            "build it with 'pip install -e .' from the checkout"
        )
    if name == "native" and device.type == "cuda" and native.cuda_extension is None:
        return f"the CUDA module of the extension cannot be used: {native.cuda_missing}"
    if name == "triton" and not TRITON_INSTALLED:
        return "triton is not installed; run 'pip install \"segkernels[gpu]\"'"
    return ""


def choose(
    op: str,
    *tensors: Tensor | None,
    backend: str | None = None,
) -> str:
    """Name of the backend that runs ``op`` on these tensors.

    Raises ValueError for an unknown name and BackendError when an explicit choice, or the
    extension that a CPU call needs, is not available, and for a tensor with a tangent (forward-mode
    differentiation), which only definitions of differentiable ops carry on. Where the extension was
    built without CUDA, or the GPU is older than sm_80, CUDA tensors run the reference, and the
    first such call of a process warns.
    """
    present = [t for t in tensors if t is not None]
    double = torch.float64 in [t.dtype for t in present]
    name, refusal = _choose(op, present[0].device, double, backend)
    if refusal and not torch.compiler.is_compiling():
        _warn_once(refusal)
    if forward_ad._current_level >= 0:
        _check_tangents(op, present, name)
    return name


def _check_tangents(op: str, tensors: list[Tensor], name: str) -> None:
    """BackendError for a tangent that would be lost."""
    carried = name == "reference" and op not in CONSTANT
    if carried or op in DISCRETE:
        return
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise BackendError(
            f"{op}: expected tensors without tangents, got forward-mode differentiation of an op "
            + (
                "that is not differentiable; detach its inputs"
                if op in CONSTANT
                else f'whose {name} implementation has no formula for it; pass backend="reference"'
            )
        )


def _choose(op: str, device: torch.device, double: bool, backend: str | None) -> tuple[str, str]:
    """(backend, why it is not a faster one that serves the device; empty when it is)."""
    asked = backend or os.environ.get("SEGKERNELS_BACKEND") or None
    if asked is not None:
        if asked not in NAMES:
            source = "backend" if backend else "SEGKERNELS_BACKEND"
            raise ValueError(
                f"{source}: expected one of {', '.join(NAMES)}, got {asked!r}; leave it out to "
                "choose by device"
            )
        reason = _refusal(op, asked, device, double)
        if reason:
            raise BackendError(f"{op}: backend {asked!r} cannot run: {reason}")
        return asked, ""
    refusal = ""
    if not double:
        for name, devices in DEVICES[op].items():
            if device.type not in devices:
                continue
            refusal = _refusal(op, name, device, double)
            if not refusal:
                return name, ""
            unserved = _unserved(op, name, device)
            if not unserved and (device.type == "cpu" or name == "triton"):
                raise BackendError(
                    f"{op}: {refusal}, or set SEGKERNELS_BACKEND=reference to run plain PyTorch"
                )
    return "reference", refusal


def row_kernels(name: str) -> ModuleType:
    """The module with the four kernels of backend ``name``."""
    return importlib.import_module(ROW_KERNELS[name], __package__)


_warned = False


def _warn_once(refusal: str) -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            f"CUDA tensors run plain PyTorch: {refusal}, or set SEGKERNELS_BACKEND=reference",
            BackendWarning,
            stacklevel=4,
        )


def explain(device: str | torch.device = "cpu") -> str:
    """A table of what would run for each op on ``device`` (fp32, bf16 or fp16), and why."""
    device = torch.device(device)
    kind = device.type
    asked = os.environ.get("SEGKERNELS_BACKEND") or None
    lines = [f"device {kind}; SEGKERNELS_BACKEND {asked or 'not set'}"]
    if native.extension is None:
        lines.append(f"extension: missing ({native.missing})")
    else:
        lines.append(f"extension: {native.extension.build_info()}, {native.threads()} threads")
    if native.cuda_extension is None:
        lines.append(f"CUDA module: cannot be used: {native.cuda_missing}")
    else:
        lines.append(f"CUDA module: {native.cuda_extension.build_info()}")
    triton = importlib.metadata.version("triton") if TRITON_INSTALLED else "not installed"
    lines.append(f"triton: {triton}")
    for op in DEVICES:
        try:
            chosen, refusal = _choose(op, device, False, None)
            if asked:
                why = "asked for by SEGKERNELS_BACKEND"
            elif chosen == "reference":
                # Why the CUDA module cannot be used is said above, once.
                why = refusal.removesuffix(f": {native.cuda_missing}") or f"no kernel serves {kind}"
            else:
                why = f"serves {kind}"
        except BackendError as error:
            chosen, why = "none", str(error)
        lines.append(f"{op:28} {chosen:10} {why}")
    return "\n".join(lines)
