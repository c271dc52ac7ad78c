"""Compiles every Triton kernel for every GPU generation, without a GPU, and holds it to a budget.

    python tests/kernel_budget.py            # fails when a kernel leaves its budget
    python tests/kernel_budget.py --update   # writes what this version of Triton gives

What is compiled is what real calls launch: they run here, on CPU tensors, up to the launch. The
budget, kernel_budget.json, has [registers of a thread, bytes of shared memory] of each kernel for
each minor version of Triton; a version without numbers is held to the largest of the others.
Nothing may spill, and kernels of rows that begin on 16 bytes must move 16 bytes an instruction up
to the row's last whole vector.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
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
# (rows, columns, row stride). Aligned rows begin and end on multiples of 16 bytes, padded ones only
# begin there, odd ones do neither.
ROWS = {
    "aligned": (2, 151_936, 151_936),
    "padded": (2, 50_257, 50_304),
    "odd": (2, 50_257, 50_257),
}
# The fewest instructions that move 16 bytes in a kernel of rows that begin on 16 bytes: those of a
# whole block, and that of a block of one vector a lane.
WIDE = {
    "accumulate": {"LDG": kernels.DEFAULTS.unroll + 1},
    "backward": dict.fromkeys(("LDG", "STG"), kernels.DEFAULTS.unroll_backward + 1),
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
    dtype: torch.dtype, rows: int, vocab: int, stride: int, everything: bool, first: int = 0
) -> None:
    """Accumulate, finish and backward, with all optional arguments or none."""
    logits, dlogits = (
        torch.empty_strided((rows, vocab), (stride, 1), dtype=dtype, device="meta")
        for _ in range(2)
    )
    up, entropy, stats = torch.ones(rows), torch.empty(rows), torch.empty(rows, 3)
    states = torch.empty(rows, 4, dtype=torch.float64)
    if everything:
        of = Rows(logits, torch.zeros(rows, dtype=torch.long), 1.0, torch.ones(rows), first)
        mask, logprobs = torch.ones(rows, dtype=torch.bool), torch.empty(rows)
    else:
        of, mask, logprobs = Rows(logits, None, 1.0, None, first), None, None
    kernels.accumulate(of, mask, states)
    kernels.finish(of, mask, states, logprobs, entropy, stats)
    kernels.backward(of, stats, logprobs, up, dlogits)


def configurations(architecture: int, dtypes: list[str]) -> dict[str, Any]:
    """Every kernel by a name that says what is compiled in."""
    found = {}
    for short in dtypes:
        dtype = getattr(torch, short)
        for rows, everything in (
            ("aligned", True),
            ("aligned", False),
            ("padded", True),
            ("odd", True),
        ):
            what = f"{rows} rows, {'all arguments' if everything else 'logits only'}"
            accumulate, finish, backward = compiled_by(
                lambda d=dtype, r=rows, e=everything: call_kernels(d, *ROWS[r], e), architecture
            )
            found[f"accumulate {short}, {what}"] = accumulate
            found[f"backward {short}, {what}"] = backward
            found[f"finish, {what.partition(', ')[2]}"] = finish
    return found


def compiled_again(architecture: int) -> list[str]:
    """Complains unless all sizes share three kernels."""

    def all_sizes() -> None:
        for rows, vocab, stride, first in (
            (2, 151_936, 151_936, 0),
            (1, 1024, 1024, 1),
            (16, 8, 2**33, 2**20),
            (70_000, 128_256, 128_256, 16),
        ):
            call_kernels(torch.bfloat16, rows, vocab, stride, True, first)

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


def moved(sass: str, instruction: str) -> Counter[int]:
    """How many instructions move how many bytes."""
    sizes = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
    count: Counter[int] = Counter()
    for modifiers in re.findall(rf"\b{instruction}\.E([.\w]*)", sass):
        count[next((sizes[m] for m in modifiers.split(".") if m in sizes), 4)] += 1
    return count


def single_elements(name: str) -> dict[str, int]:
    """The most instructions that move a single logit, or as many bytes, in a kernel of rows that
    begin on 16 bytes."""
    scalars = 0  # other numbers of the row that are as large as a logit
    everything = "all arguments" in name
    rest = "padded" in name  # the columns behind the last whole vector, one a lane
    if name.startswith("accumulate"):
        if "float32" in name:
            scalars = everything  # its temperature
        return {"LDG": scalars + everything + rest, "STG": 0}  # with the target's logit
    if "float32" in name:
        scalars = 6 if everything else 4  # stats, upstream gradients, temperature
    return {"LDG": scalars + rest, "STG": 2 * rest}  # gradients, or zeros


def narrow_or_missing(name: str, sass: str) -> list[str]:
    """Where a kernel of rows that begin on 16 bytes moves less than 16 bytes an instruction."""
    size = 4 if "float32" in name else 2
    found = []
    for instruction, most in single_elements(name).items():
        count = moved(sass, instruction)
        least = WIDE[name.split()[0]].get(instruction, 0)
        if count[16] < least:
            found.append(f"{count[16]} {instruction} of 16 bytes, expected {least} or more")
        if count[size] > most:
            found.append(f"{count[size]} {instruction} of {size} bytes, expected {most} or fewer")
    return found


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
        if "aligned" in name or "padded" in name:
            faults += [f"{where}: {fault}" for fault in narrow_or_missing(name, sass)]
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
