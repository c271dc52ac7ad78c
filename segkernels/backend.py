"""Which implementation runs: one table, one function.

``backend=`` of the call, else the environment variable ``SEGKERNELS_BACKEND``, else by device.
What was asked for and is not available raises with the reason; nothing falls back silently.
Triton kernels run on NVIDIA GPUs, and on CPUs under Triton's interpreter (``TRITON_INTERPRET=1``)
when they are asked for.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os

import torch
from torch import Tensor

from . import native

NAMES = ("reference", "native", "triton")

# Devices that each backend of an op serves. The reference serves every op on every device.
DEVICES: dict[str, dict[str, tuple[str, ...]]] = {
    "entropy_from_logits": {"native": ("cpu",), "triton": ("cuda",)},
    "logprobs_and_entropy": {"native": ("cpu",), "triton": ("cuda",)},
    "linear_logprobs_and_entropy": {"native": ("cpu",), "triton": ("cuda",)},
    "vocab_shard_stats": {"native": ("cpu",), "triton": ("cuda",)},
    "merge_vocab_stats": {"native": ("cpu",), "triton": ("cuda",)},
    "segment_ends": {"native": ("cpu",)},
    "segment_offsets": {},
    "segment_scores": {"native": ("cpu",)},
    "segment_bradley_terry": {"native": ("cpu",)},
    "scatter_segment_rewards": {"native": ("cpu",)},
    "RunningLocationNormalizer": {"native": ("cpu",)},
    "gae": {"native": ("cpu",)},
    "segment_advantages": {"native": ("cpu",)},
    "whiten": {"native": ("cpu",)},
    "policy_loss": {"native": ("cpu",)},
    "value_loss": {"native": ("cpu",)},
    "linear_policy_loss": {"native": ("cpu",), "triton": ("cuda",)},
}

TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


class BackendError(RuntimeError):
    """The backend that was asked for cannot run this call; the message says why."""


def _unserved(op: str, name: str, device: torch.device) -> str:
    """Why backend ``name`` of ``op`` is not for this device; empty when it is."""
    devices = DEVICES[op].get(name, ())
    if name == "triton" and devices and os.environ.get("TRITON_INTERPRET") == "1":
        devices = (*devices, "cpu")
    if device.type not in devices:
        served = " and ".join(devices) if devices else "no device"
        return f"its {name} implementation serves {served}, the tensors are on {device.type}"
    if name == "triton" and device.type == "cuda" and torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(device)
        if torch.version.hip or gpu.major < 8:
            return f"its triton implementation serves NVIDIA GPUs from sm_80 on, not {gpu.name}"
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
    if name == "native" and native.extension is None:
        return (
            f"the compiled extension is missing ({native.missing}); "
            "build it with 'pip install -e .' from the checkout"
        )
    if name == "triton" and not TRITON_INSTALLED:
        return "triton is not installed; run 'pip install \"segkernels[gpu]\"'"
    return ""


def choose(op: str, *tensors: Tensor | None, backend: str | None = None) -> str:
    """Name of the backend that runs ``op`` on these tensors.

    Raises ValueError for an unknown name and BackendError when an explicit choice, or the
    extension that a CPU call needs, is not available.
    """
    present = [t for t in tensors if t is not None]
    double = any(t.dtype == torch.float64 for t in present)
    return _choose(op, present[0].device, double, backend)


def _choose(op: str, device: torch.device, double: bool, backend: str | None) -> str:
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
        return asked
    if double:
        return "reference"
    for name, devices in DEVICES[op].items():
        if device.type in devices and not _unserved(op, name, device):
            reason = _refusal(op, name, device, double)
            if reason:
                raise BackendError(
                    f"{op}: {reason}, or set SEGKERNELS_BACKEND=reference to run plain PyTorch"
                )
            return name
    return "reference"


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
    triton = importlib.metadata.version("triton") if TRITON_INSTALLED else "not installed"
    lines.append(f"triton: {triton}")
    for op in DEVICES:
        try:
            chosen = _choose(op, device, False, None)
            if asked:
                why = "asked for by SEGKERNELS_BACKEND"
            elif chosen == "reference":
                unserved = [_unserved(op, n, device) for n, d in DEVICES[op].items() if kind in d]
                why = unserved[0] if unserved else f"no kernel serves {kind}"
            else:
                why = f"serves {kind}"
        except BackendError as error:
            chosen, why = "none", str(error)
        lines.append(f"{op:28} {chosen:10} {why}")
    return "\n".join(lines)
