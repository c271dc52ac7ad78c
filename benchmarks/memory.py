"""The most memory that a call needs."""

from __future__ import annotations

import ctypes
import gc
import platform
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor


def status(key: str) -> int:
    """Bytes that Linux counts under that name: VmRSS now, VmHWM at most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def peak_memory(run: Callable[[], dict[str, Tensor]], device: torch.device) -> int | None:
    """Bytes that a call adds at its highest, its outputs included; None where nobody counts them.

    On GPUs by torch's allocator. On CPUs by the high-water mark of the process's resident memory,
    which Linux lets us reset: it sees the memory of every library, not torch's alone. Freed memory
    is given back first, or the call would find it and seem to need none.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if platform.system() != "Linux":
        return None
    ctypes.CDLL(None).malloc_trim(0)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    kept = run()
    after = status("VmHWM")
    del kept
    return max(0, after - before)
