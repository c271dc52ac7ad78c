"""Compiles every Triton kernel for every GPU generation, without a GPU, and holds it to a budget.

    python tests/kernel_budget.py            # fails when a kernel leaves its budget
    python tests/kernel_budget.py --update   # writes what this version of Triton gives

What is compiled is what real calls launch: they run here, on CPU tensors, up to the launch. The
budget, kernel_budget.json, has [registers of a thread, bytes of shared memory] of each kernel for
each minor version of Triton; a version without numbers is held to the largest of the others.
Nothing may spill, and kernels of aligned rows must move 16 bytes an instruction.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from segkernels.triton import vocab as kernels
from segkernels.vocab import Rows

ARCHITECTURES = [80, 90, 100]
DTYPES = ["float32", "bfloat16", "float16"]
BUDGET = Path(__file__).with_suffix(".json")
VERSION = ".".join(triton.__version__.split(".")[:2])
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# 16-byte instructions that a kernel of aligned rows has at least.
WIDE = {
    "accumulate": {"LDG": kernels.UNROLL.value},
    "backward": {"LDG": kernels.UNROLL_BACKWARD.value, "STG": kernels.UNROLL_BACKWARD.value},
}


class NoGPU:
    """As much of a driver as compilation asks for."""

    def __init__(self, architecture: int):
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture  # compiled kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0


def compiled_by(call: Callable[[], None], architecture: int) -> list[Any]:
    """The kernels that ``call`` would launch on a GPU of that architecture."""
    found = []

    def compile_only(kernel: Any, programs: int, like: torch.Tensor, **arguments: Any) -> None:
        found.append(kernel.warmup(grid=(programs,), **arguments, **kernels.OPTIONS))

    kernels._launch = compile_only
    driver.set_active(NoGPU(architecture))
    call()
    return found


def call_kernels(
    dtype: torch.dtype, vocab: int, everything: bool, rows: int = 2, stride: int = 0, first: int = 0
) -> None:
    """Accumulate, finish and backward, with all optional arguments or none."""
    logits = torch.empty_strided((rows, vocab), (stride or vocab, 1), dtype=dtype, device="meta")
    up, entropy, stats = torch.ones(rows), torch.empty(rows), torch.empty(rows, 3)
    states = torch.empty(rows, 4, dtype=torch.float64)
    if everything:
        of = Rows(logits, torch.zeros(rows, dtype=torch.long), 1.0, torch.ones(rows), first)
        mask, logprobs = torch.ones(rows, dtype=torch.bool), torch.empty(rows)
    else:
        of, mask, logprobs = Rows(logits, None, 1.0, None, first), None, None
    kernels.accumulate(of, mask, states)
    kernels.finish(of, mask, states, logprobs, entropy, stats)
    kernels.backward(of, stats, logprobs, up, torch.empty_like(logits))


def configurations(architecture: int, dtypes: list[str]) -> dict[str, Any]:
    """Every kernel by a name that says what is compiled in."""
    found = {}
    for short in dtypes:
        dtype = getattr(torch, short)
        for rows, vocab, everything in (
            ("aligned", 151_936, True),
            ("aligned", 151_936, False),
            ("odd", 50_257, True),
        ):
            what = f"{rows} rows, {'all arguments' if everything else 'logits only'}"
            accumulate, finish, backward = compiled_by(
                lambda d=dtype, v=vocab, e=everything: call_kernels(d, v, e), architecture
            )
            found[f"accumulate {short}, {what}"] = accumulate
            found[f"backward {short}, {what}"] = backward
            found[f"finish, {what.partition(', ')[2]}"] = finish
    return found


def compiled_again(architecture: int) -> list[str]:
    """Complains unless all sizes share three kernels."""

    def all_sizes() -> None:
        for rows, vocab, stride, first in (
            (2, 151_936, 0, 0),
            (1, 1024, 0, 1),
            (16, 8, 2**33, 2**20),
            (70_000, 128_256, 0, 16),
        ):
            call_kernels(torch.bfloat16, vocab, True, rows, stride, first)

    count = len({kernel.hash for kernel in compiled_by(all_sizes, architecture)})
    return [] if count == 3 else [f"sm_{architecture}: sizes make {count} kernels of 3"]


def disassembled(cubin: bytes) -> tuple[str, str]:
    """(resource usage, SASS)"""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run(
                [TOOLS / "cuobjdump", option, file.name], check=True, capture_output=True, text=True
            ).stdout
            for option in ("-res-usage", "-sass")
        )
    return usage, sass


def measure(architecture: int, dtypes: list[str]) -> tuple[dict[str, list[int]], list[str]]:
    """[registers, shared memory] by configuration, and what no budget can allow."""
    usages, faults = {}, compiled_again(architecture)
    for name, kernel in configurations(architecture, dtypes).items():
        usage, sass = disassembled(kernel.asm["cubin"])
        registers, stack, local = (
            int(re.search(rf"\b{word}:(\d+)", usage)[1]) for word in ("REG", "STACK", "LOCAL")
        )
        usages[name] = [registers, kernel.metadata.shared]
        where = f"sm_{architecture} {name}"
        if stack or local:
            faults.append(f"{where}: spills ({stack} bytes of stack, {local} local)")
        expected = WIDE.get(name.split()[0], {}) if "aligned" in name else {}
        for instruction, least in expected.items():
            wide = len(re.findall(rf"\b{instruction}\.E\.(?:\w+\.)*128\b", sass))
            if wide < least:
                faults.append(f"{where}: {wide} {instruction} of 16 bytes, expected {least}")
    return usages, faults


def excesses(usages: dict[str, dict[str, list[int]]], budgets: dict[str, Any]) -> list[str]:
    """What exceeds the budget of this version, or else the largest of all versions."""
    held_to = [budgets[VERSION]] if VERSION in budgets else list(budgets.values())
    found = []
    for name, by_architecture in usages.items():
        for architecture, used in by_architecture.items():
            allowed = [b[name][architecture] for b in held_to if architecture in b.get(name, {})]
            if not allowed:
                found.append(f"{architecture} {name}: has no budget; run with --update")
                continue
            budget = [max(of_versions) for of_versions in zip(*allowed, strict=True)]
            units = ("registers", "bytes of shared memory")
            for what, count, most in zip(units, used, budget, strict=True):
                if count > most:
                    found.append(f"{architecture} {name}: {count} {what}, the budget is {most}")
    return found


def written(budgets: dict[str, Any]) -> str:
    """JSON with one line a kernel."""
    versions = []
    for version, by_name in sorted(budgets.items()):
        lines = [f"    {json.dumps(n)}: {json.dumps(u)}" for n, u in sorted(by_name.items())]
        versions.append(f"  {json.dumps(version)}: {{\n" + ",\n".join(lines) + "\n  }")
    return "{\n" + ",\n".join(versions) + "\n}\n"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Budget of the Triton kernels.")
    parser.add_argument("--update", action="store_true", help="write what is used as the budget")
    parser.add_argument("--sm", type=int, nargs="+", default=ARCHITECTURES, help="of these only")
    parser.add_argument("--dtype", nargs="+", default=DTYPES, help="of these only")
    options = parser.parse_args(arguments)
    if options.update and (options.sm, options.dtype) != (ARCHITECTURES, DTYPES):
        parser.error("--update writes the budget of all kernels: leave --sm and --dtype out")

    usages: dict[str, dict[str, list[int]]] = {}
    faults = []
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        measured = pool.map(partial(measure, dtypes=options.dtype), options.sm)
        for architecture, (used, found) in zip(options.sm, measured, strict=True):
            faults += found
            for name, usage in used.items():
                usages.setdefault(name, {})[f"sm_{architecture}"] = usage
    budgets = json.loads(BUDGET.read_text()) if BUDGET.exists() else {}
    if options.update:
        BUDGET.write_text(written({**budgets, VERSION: usages}))
    else:
        faults += excesses(usages, budgets)
    print("\n".join(faults) or f"{len(usages)} kernels within budget, Triton {VERSION}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
