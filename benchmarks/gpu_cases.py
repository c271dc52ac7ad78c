"""What ``make gpu`` measures, one job a process; ``gpu.py`` asks for them by name.

``--dry-run`` walks the same jobs on small inputs on the CPU, where times mean nothing.
"""

from __future__ import annotations

import argparse
import math
import site
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # nothing has to be installed

import bench_linear as linear
import bench_sequence as sequence
import bench_token_stats as stats
import shapes
import torch
from cases import OURS, Case, Missing
from compare import compare
from goals import LIGER
from gpu_clock import EventClock, graph, launches, one_by_one
from gpu_sweep import row_kernels, tiles
from gpu_worker import announce, serve
from machine import copy_bandwidth, header
from timing import wall_clock

import segkernels as sk

Request = Mapping[str, Any]
PROFILER = "the profiler"
FP32, BF16 = torch.float32, torch.bfloat16


@dataclass(frozen=True)
class Measurement:
    """A case by its seed, and how it is timed."""

    make: Callable[[int], Case]
    goal: bool = False  # a goal is held against it: it is measured early, and again with everybody
    graph: bool = False  # on copies of the inputs beyond what the L2 cache holds, all in one graph


def measurements(dry: bool) -> dict[str, Measurement]:
    device = "cpu" if dry else "cuda"

    def size(full: int, small: int) -> int:
        return small if dry else full

    def large(make: Callable[..., Case], *args: Any, goal: bool = False, **options: Any):
        return Measurement(lambda seed: make(*args, **options), goal)

    def short(make: Callable[..., Case], layout: str, rows: int, tokens: int, **options: Any):
        goal = options.pop("goal", False)

        def case(seed: int) -> Case:
            lengths = shapes.row_lengths(layout, size(rows, 4), size(tokens, 33))
            lengths += [32] * (len(lengths) % 2)
            return make(layout, shapes.stream(lengths, device, seed=seed), **options)

        return Measurement(case, goal, graph=True)

    wide = (size(8192, 6), size(151_936, 999), BF16, device)
    shape = (size(8192, 6), size(4096, 16), size(131_072, 333), BF16, device)
    loss = (size(8, 2), size(1024, 3), *shape[1:])

    def backward_alone() -> Case:
        case = stats.logprobs_and_entropy(*wide, backward=True, forward=False)
        # What these keep for their backward pass, all at once, fills the GPU.
        case.contenders = [x for x in case.contenders if x.name not in ("eager", "verl")]
        return case

    path = sequence.boundaries_to_advantages
    bradley_terry = sequence.segment_bradley_terry
    found = {
        "entropy": large(stats.entropy, *wide, goal=True),
        "log-prob + entropy, backward": large(backward_alone, goal=True),
        "linear, forward": large(linear.linear, *shape, goal=True),
        "linear, forward + backward": large(linear.linear, *shape, backward=True, goal=True),
    }
    for gated in (0.0, 0.5, 0.9):
        found[f"policy loss, {gated:.0%} gated"] = large(
            linear.linear_policy_loss, *loss, gated=gated, goal=True
        )
    found |= {
        "boundaries to advantages": short(path, "uniform", 512, 4096, goal=True),
        "boundaries to advantages, 16M tokens": short(path, "uniform", 4096, 4096, goal=True),
        "Bradley-Terry, forward": short(
            bradley_terry, "uniform", 512, 4096, backward=False, goal=True
        ),
        "Bradley-Terry, forward + backward": short(
            bradley_terry, "uniform", 512, 4096, backward=True, goal=True
        ),
        "log-prob + entropy": large(stats.logprobs_and_entropy, *wide),
        "log-prob + entropy, forward + backward": large(
            stats.logprobs_and_entropy, *wide, backward=True
        ),
        "entropy, fp32": large(stats.entropy, size(8192, 6), size(32_064, 999), FP32, device),
        "entropy, masked": large(
            stats.masked_entropy, size(8, 2), size(1024, 3), size(32_064, 999), BF16, device
        ),
        "boundaries to advantages, long-tailed": short(path, "long-tailed", 512, 8192),
        "boundaries to advantages, giant": short(path, "giant", 512, 16_384),
    }
    for op in (
        sequence.segment_ends,
        sequence.scatter_segment_rewards,
        sequence.segment_advantages,
        sequence.gae,
        sequence.whiten,
    ):
        found[op.__name__] = short(op, "uniform", 512, 4096)
    for op in (sequence.segment_scores, sequence.policy_loss, sequence.value_loss):
        found[op.__name__] = short(op, "uniform", 512, 4096, backward=True)
    return found


def _asked_for(case: Case, request: Request) -> Case:
    """With ours and those that a goal names, or everybody; less those that must not run."""
    contenders = [
        each
        for each in case.contenders
        if request["everybody"] or each.role == "ours" or each.name == LIGER
    ]
    without = request["without"]
    case.contenders = [
        replace(each, forward=Missing(without[each.name])) if each.name in without else each
        for each in contenders
    ]
    return case


def _beyond_the_cache(size: int) -> int:
    """How many copies of so many bytes fill the L2 cache twice."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return min(64, max(3, math.ceil(2 * cache / max(size, 1))))


def measure(name: str, dry: bool, request: Request) -> dict[str, Any]:
    """The case's line of the result file."""
    measurement = measurements(dry)[name]
    case = _asked_for(measurement.make(0), request)
    clock, seconds = (wall_clock, 0.0) if dry else (EventClock(), 0.2)
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    copies, batch = [], None
    if measurement.graph:
        count = 2 if dry else _beyond_the_cache(case.moved)
        copies = [_asked_for(measurement.make(seed), request) for seed in range(1, count)]
        batch = one_by_one if dry else graph(clock)
    comparison = compare(case, seconds, clock, copies, batch, announce)
    comparison.alternation.run()
    line = comparison.finish()
    if dry or not measurement.graph or PROFILER in request["without"]:
        return line
    announce(PROFILER)
    ours = next(each for each in line["contenders"] if each["name"] == OURS)
    ours |= launches(case.call(case.named(OURS)))
    return line


def facts(dry: bool, request: Request) -> dict[str, Any]:
    """The header of the result file, and the names of all cases."""
    gpu = torch.cuda.is_available() and not dry
    found = header("cuda" if gpu else "none")
    if gpu and request["copy"]:
        announce("the copy")
        found["copy_bandwidth"] = copy_bandwidth(EventClock())
    every = measurements(dry)
    return {"facts": found, "cases": {name: each.goal for name, each in every.items()}}


def smoke(dry: bool) -> dict[str, Any]:
    """Each kind of kernel once on small inputs, and what would run."""
    device = "cpu" if dry else "cuda"
    print(sk.backend.explain(device))
    stream = shapes.stream([33, 1, 700, 300], device)
    checked = {}
    for case in (
        stats.logprobs_and_entropy(6, 999, BF16, device, backward=True),
        linear.linear_policy_loss(2, 3, 64, 999, BF16, device),
        sequence.boundaries_to_advantages("uniform", stream),
        sequence.segment_bradley_terry("uniform", stream, backward=True),
    ):
        announce(case.op)
        asked = _asked_for(case, {"everybody": False, "without": {LIGER: "not asked"}})
        results = compare(asked, 0.0).results
        checked[case.op] = results[OURS]["error"]
    build = sk.native.extension.build_info() if sk.native.extension else sk.native.missing
    return {"build": build, "errors": checked, "cuda_missing": sk.native.cuda_missing}


def jobs(dry: bool) -> dict[str, Callable[[Request], dict[str, Any]]]:
    device, clock = ("cpu", wall_clock) if dry else ("cuda", EventClock())
    return {
        "facts": partial(facts, dry),
        "smoke": lambda request: smoke(dry),
        "sweep tiles": lambda request: tiles(device, clock, dry),
        "sweep row kernels": lambda request: row_kernels(device, clock, dry, request["sizes"]),
        **{name: partial(measure, name, dry) for name in measurements(dry)},
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--peers", help="folder with packages that the interpreter lacks")
    options = parser.parse_args()
    if options.peers:
        site.addsitedir(options.peers)  # behind what is installed
    serve(jobs(options.dry_run))
