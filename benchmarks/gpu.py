"""``make gpu``: build, tests, compute-sanitizer and benchmarks on an NVIDIA GPU, in eight minutes.

Runs from a plain checkout under an interpreter that has torch, Triton, pybind11, CMake, pytest and
hypothesis; asks nothing of a network. Without a GPU every step that needs none is walked, the
others say so, and the exit status is 1, or 0 with --dry-run.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "python")]  # nothing of this has to be installed
NEEDED = ("torch", "triton", "pybind11", "cmake", "pytest", "hypothesis")
MINUTES = 8
# Of the eight minutes, for what comes before the benchmarks, in seconds; they get the rest.
LIMITS = {"build": 150, "tests": 120, "memcheck": 60, "racecheck": 60}


class Failed(RuntimeError):
    """A step that did not pass; the run goes on, and fails at its end."""


@dataclass
class Run:
    dry: bool  # there is no GPU: walk, do not measure
    results: Path | None
    begin: float

    @property
    def left(self) -> float:
        return MINUTES * 60 - (time.monotonic() - self.begin)


def _execute(command: list[str], seconds: float, **environment: str) -> None:
    print("$", *(f"{k}={v}" for k, v in environment.items()), *command, flush=True)
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | environment, timeout=max(1, seconds)
        )
    except subprocess.TimeoutExpired:
        raise Failed(f"did not end within {seconds:.0f} s") from None
    if done.returncode:
        raise Failed(f"exit status {done.returncode}")


# ---- steps -------------------------------------------------------------------------------------


def packages(run: Run) -> None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise Failed(
            f"{sys.executable} lacks {', '.join(missing)}; choose another interpreter with "
            "'make gpu PYTHON=...', or install them there"
        )


def build(run: Run) -> None:
    options = os.environ.get("CMAKE_ARGS", "") + ("" if run.dry else " -DSEGK_CUDA=ON")
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    _execute(command, LIMITS["build"], CMAKE_ARGS=options)


PYTEST = (sys.executable, "-m", "pytest", "-q", "-m", "gpu")


def tests(run: Run) -> None:
    # The kernels' tests; those of the training layer need packages that kernels do not.
    command = [*PYTEST, "--ignore=tests/segrlhf"]
    if run.dry:
        _execute([*command, "-q", "--collect-only"], LIMITS["tests"])
        print("skipped: the tests themselves need a GPU")
        return
    _execute([*command, "--durations=5"], LIMITS["tests"], SEGKERNELS_REQUIRE="cuda,triton")


def _sanitizer(tool: str) -> Callable[[Run], None]:
    def step(run: Run) -> None:
        found = shutil.which("compute-sanitizer")
        if found is None or run.dry:
            print(f"skipped: {'there is no compute-sanitizer' if not found else 'needs a GPU'}")
            return
        # torch's allocator hands out parts of large blocks, between which nothing is out of bounds.
        # Graph capture needs that allocator, and what torch.compile makes is not ours to check.
        ours = ("-x", "tests/test_cuda.py", "-k", "not test_gpu_ or million")
        _execute(
            [found, f"--tool={tool}", "--error-exitcode=1", *PYTEST, *ours],
            LIMITS[tool],
            SEGKERNELS_REQUIRE="cuda,triton",
            PYTORCH_NO_CUDA_MEMORY_CACHING="1",
        )

    return step


def benchmarks(run: Run) -> None:
    import harness
    import tables
    import torch

    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    results: list[dict[str, Any]] = []
    failed, left_out = [], []
    for name, measure in cases(run):
        # Half a minute to write results in; a case that begins later would end too late.
        if run.left < 30 and not run.dry:
            left_out.append(name)
            continue
        begin = time.monotonic()
        try:
            results += measure()
        except Exception:
            traceback.print_exc()
            failed.append(name)
        if not run.dry:
            torch.cuda.empty_cache()
        print(f"{name}: {time.monotonic() - begin:.1f} s", flush=True)
    if run.dry:
        print(f"walked {len(results)} measurements on small inputs; no time of theirs is kept")
    else:
        facts = harness.header(torch.device("cuda"))
        facts |= {"copy_bandwidth": harness.copy_bandwidth(event_clock), "left_out": left_out}
        print(tables.text(tables.File(facts, results)))
        path = (run.results or harness.RESULTS) / harness.result_file(facts).name
        harness.write_results(path, facts, results)
        print(f"results: {path}")
        if run.results is None:
            tables.main()
    if left_out:
        print(f"no time was left for: {', '.join(left_out)}")
    if failed:
        raise Failed(f"{', '.join(failed)}")


STEPS: dict[str, Callable[[Run], None]] = {
    "packages": packages,
    "build": build,
    "tests": tests,
    "memcheck": _sanitizer("memcheck"),
    "racecheck": _sanitizer("racecheck"),
    "benchmarks": benchmarks,
}


# ---- clocks ------------------------------------------------------------------------------------


def event_clock(run: Callable[[], Any], repeats: int) -> float:
    import torch

    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def graph(runs: list[Callable[[], Any]]):
    """All calls as one CUDA graph, so that the host's launches cost nothing; what synchronises, or
    takes longer than launches do, is timed call by call."""
    import torch
    from harness import Timed

    def one_by_one():
        for run in runs:
            run()

    runs[0]()
    if event_clock(runs[0], 1) > 20e-3:
        return Timed(runs[0]), "calls"
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for run in runs * 2:
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(captured):
            one_by_one()
    except RuntimeError:
        torch.cuda.synchronize()
        return Timed(one_by_one, len(runs)), "calls; no CUDA graph can be captured"
    return Timed(captured.replay, len(runs)), "CUDA graph"


def _launches(run: Callable[[], Any]) -> dict[str, Any]:
    """How many kernels a call launches, and whether the host waits for one."""
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
        waits = False
    except RuntimeError:
        waits = True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        run()
        torch.cuda.synchronize()
    launches = sum(
        event.device_type == DeviceType.CUDA and not event.name.startswith(("Memcpy", "Memset"))
        for event in recorded.events()
    )
    return {"launches": launches, "synchronises": waits}


# ---- cases -------------------------------------------------------------------------------------


def cases(run: Run) -> Iterator[tuple[str, Callable[[], list[dict[str, Any]]]]]:
    """The goals' measurements first, then the rest."""
    import bench_linear
    import bench_sequence
    import bench_token_stats
    import harness
    import shapes
    import torch
    from harness import OURS

    device = "cpu" if run.dry else "cuda"
    bf16 = torch.bfloat16
    seconds = 0.0 if run.dry else 0.2
    clock = harness.wall_clock if run.dry else event_clock

    def size(full: int, small: int) -> int:
        return small if run.dry else full

    def large(make: Callable[[], harness.Case]) -> Callable[[], list[dict[str, Any]]]:
        def measure():
            return _alternate(harness.compare(make(), seconds, clock))

        return measure

    def small(op: Callable[..., harness.Case], name: str, rows: int, tokens: int, **options: Any):
        """Copies of the inputs beyond what the L2 cache holds, all in one graph."""

        def make(seed: int) -> harness.Case:
            lengths = shapes.row_lengths(name, size(rows, 4), size(tokens, 33))
            lengths += [32] * (len(lengths) % 2)
            return op(name, shapes.stream(lengths, device, seed=seed), **options)

        def measure():
            case = make(0)
            if run.dry:
                return _alternate(harness.compare(case, seconds, clock))
            cache = torch.cuda.get_device_properties(0).L2_cache_size
            count = min(64, max(3, math.ceil(2 * cache / max(case.moved, 1))))
            copies = [make(seed) for seed in range(1, count)]
            results = _alternate(harness.compare(case, seconds, clock, copies, graph))
            ours = case.call(case.runs()[OURS])
            for result in results:
                if result["contender"] == OURS:
                    result |= _launches(ours)
            return results

        return measure

    vocab, rows = size(151_936, 999), size(8192, 6)
    shape = (size(8192, 6), size(4096, 16), size(131_072, 333), bf16, device)
    loss_shape = (size(8, 2), size(1024, 3), *shape[1:])
    stats, sequence, linear = bench_token_stats, bench_sequence, bench_linear

    def backward_alone() -> harness.Case:
        case = stats.logprobs_and_entropy(rows, vocab, bf16, device, backward=True, forward=False)
        # What eager forms keep for their backward pass, all at once, fills the GPU.
        for name in ("eager", "verl"):
            case.contenders.pop(name, None)
        return case

    yield "entropy", large(lambda: stats.entropy(rows, vocab, bf16, device))
    yield "log-prob + entropy, backward", large(backward_alone)
    yield "linear, forward", large(lambda: linear.linear(*shape))
    yield "linear, forward + backward", large(lambda: linear.linear(*shape, backward=True))
    for gated in (0.0, 0.5, 0.9):
        policy = partial(linear.linear_policy_loss, *loss_shape, gated=gated)
        yield f"policy loss, {gated:.0%} gated", large(policy)
    path = sequence.boundaries_to_advantages
    yield "boundaries to advantages", small(path, "uniform", 512, 4096)
    yield "boundaries to advantages, 16M tokens", small(path, "uniform", 4096, 4096)
    for backward in (False, True):
        yield (
            f"Bradley-Terry {'forward + backward' if backward else 'forward'}",
            small(sequence.segment_bradley_terry, "uniform", 512, 4096, backward=backward),
        )
    yield "log-prob + entropy", large(lambda: stats.logprobs_and_entropy(rows, vocab, bf16, device))
    yield (
        "log-prob + entropy, forward + backward",
        large(lambda: stats.logprobs_and_entropy(rows, vocab, bf16, device, backward=True)),
    )
    fp32 = torch.float32
    yield "entropy, fp32", large(lambda: stats.entropy(rows, size(32_064, 999), fp32, device))
    masked = (size(8, 2), size(1024, 3), size(32_064, 999), bf16, device)
    yield "entropy, masked", large(lambda: stats.masked_entropy(*masked))
    for name, rows_, tokens in (("long-tailed", 512, 8192), ("giant", 512, 16_384)):
        yield f"boundaries to advantages, {name}", small(path, name, rows_, tokens)
    for op in (
        sequence.segment_ends,
        sequence.scatter_segment_rewards,
        sequence.segment_advantages,
        sequence.gae,
        sequence.whiten,
    ):
        yield op.__name__, small(op, "uniform", 512, 4096)
    for op in (sequence.segment_scores, sequence.policy_loss, sequence.value_loss):
        yield op.__name__, small(op, "uniform", 512, 4096, backward=True)


def _alternate(comparison: Any) -> list[dict[str, Any]]:
    for _ in range(comparison.alternation.rounds):
        comparison.alternation.round()
    return comparison.finish()


# ---- the run -----------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dry-run", action="store_true", help="succeed without a GPU")
    parser.add_argument("--results", type=Path, help="directory for the result file")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    options = parser.parse_args()

    run = Run(dry=True, results=options.results, begin=time.monotonic())
    if importlib.util.find_spec("torch") is not None:
        import torch

        gpu = torch.cuda.is_available() and not options.dry_run
        run = replace(run, dry=not gpu)
        print(f"GPU: {torch.cuda.get_device_name()}" if gpu else "GPU: none is used")
    failed = []
    for name in options.steps:
        print(f"== {name} ({run.left:.0f} s left)", flush=True)
        try:
            STEPS[name](run)
        except Failed as error:
            print(f"{name}: FAILED: {error}", flush=True)
            failed.append(name)
            if name in ("packages", "build"):
                break
    if failed:
        print(f"FAILED: {', '.join(failed)}")
        return 1
    if run.dry and not options.dry_run:
        print("FAILED: there is no GPU; every step that needs none has passed")
        return 1
    print(f"passed in {MINUTES * 60 - run.left:.0f} s" + (", dry run" if run.dry else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
