"""What a result file says of the code, the machine and the versions."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
from collections.abc import Iterable
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from timing import Clock, wall_clock

import segkernels

ROOT = Path(__file__).resolve().parent.parent

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "trl",
    "verl",
    "liger-kernel",
    "cut-cross-entropy",
    "quack-kernels",
)


def last_level_cache() -> int:
    """Bytes; 0 where Linux does not say."""
    sizes = [
        int(path.read_text().strip().removesuffix("K")) * 1024
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    ]
    return max(sizes, default=0)


def read_bandwidth(times: int = 5) -> float:
    """Bytes per second of the fastest of several reads of more than any cache holds."""
    x = torch.ones(max(1 << 28, 4 * last_level_cache() // 4))
    reads = (x.sum, lambda: torch.dot(x, x), x.view(torch.int32).max)
    for read in reads:
        read()
    return 4 * x.numel() / min(wall_clock(read, 1) for read in reads for _ in range(times))


def copy_bandwidth(clock: Clock, times: int = 20) -> float:
    """Bytes read and written per second by a copy on the GPU, the median of some."""
    x = torch.ones(1 << 29, device="cuda")
    y = torch.empty_like(x)
    y.copy_(x)
    return 8 * x.numel() / statistics.median(clock(lambda: y.copy_(x), 1) for _ in range(times))


def _output(*command: str) -> str | None:
    """None where the program is missing or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
    name = facts.get("model name", platform.machine())
    detail = " ".join(f"{k} {facts[k]}" for k in ("cpu family", "model") if k in facts)
    return f"{name} ({detail})" if detail else name


def _versions(packages: Iterable[str]) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def header(device: str) -> dict[str, Any]:
    """The first line of a result file: of "cpu", "cuda" or, for a run that measures nothing,
    "none". Without git its commit is None."""
    changes = _output("git", "status", "--porcelain", "--", "segkernels", "csrc", "python")
    facts = {
        "commit": _output("git", "rev-parse", "HEAD"),
        "uncommitted": None if changes is None else bool(changes),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": _versions(PACKAGES),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    of_device = {"cpu": _cpu, "cuda": _gpu, "none": lambda: {"device": "none"}}
    return facts | of_device[device]()


def _cpu() -> dict[str, Any]:
    build = segkernels.native.extension.build_info()
    return {
        "build": build,
        "device": "cpu",
        "isa": build.split(";")[0].removeprefix("isa "),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "last_level_cache": last_level_cache(),
    }


def _gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "device": properties.name,
        "cuda": torch.version.cuda,
        "driver": driver and driver.splitlines()[0],
        "memory": properties.total_memory,
        "l2_cache": properties.L2_cache_size,
    }
