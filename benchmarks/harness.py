"""Contenders side by side: checked against the definition first, then timed in alternation.

A case is one op on one workload. Each contender gets the same inputs and is held to the fp64
definition; one that misses it has an error and no time. Rounds go through all contenders in turn,
each round starting with another one, so that whatever slows the machine slows all of them.
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import segkernels as sk

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
OURS = "segkernels"

Outputs = dict[str, Tensor]
Forward = Callable[..., Outputs]
Clock = Callable[[Callable[[], Any], int], float]  # seconds of so many calls

# A contender may be wrong by this share of the largest true value, in the storage dtype of the
# inputs: four roundings in half precision, where peers compute in it, and four digits in float32.
# Coarser than tests/tolerance.py on purpose: that one is for our kernels, this one lets everybody
# run who computes the right thing. The error stands beside every time.
ALLOWED = {
    torch.float32: 1e-4,
    torch.bfloat16: 4 * torch.finfo(torch.bfloat16).eps,
    torch.float16: 4 * torch.finfo(torch.float16).eps,
}

SHORTEST = 4e-3  # seconds of a sample: quicker calls are repeated within it
PAUSE = 5e-3  # seconds before a sample: the last contender's threads spin a while before they sleep
FEWEST, MOST = 3, 50  # samples of a contender
LONGEST = 5.0  # seconds: a call that takes longer is timed once


@dataclass(frozen=True)
class Missing:
    """Why a contender does not run here."""

    reason: str


@dataclass(frozen=True)
class Contender:
    """A function of the case's inputs by name, or of inputs of its own."""

    forward: Forward
    inputs: Mapping[str, Any] | None = None
    restore: Callable[[Outputs], Outputs] = dict  # its outputs in the shape of the definition's


@dataclass
class Case:
    """One op on one workload, and everything that computes it."""

    op: str
    workload: str
    dtype: torch.dtype
    inputs: Mapping[str, Any]
    definition: Forward  # the reference; called with floats in fp64
    contenders: dict[str, Contender | Forward | Missing]
    upstream: Mapping[str, Tensor] = field(default_factory=dict)  # by output; none: forward only
    wrt: tuple[str, ...] = ()  # inputs that get a gradient
    backward_alone: bool = False  # the forward pass is done beforehand
    rows: slice | None = None  # tokens whose outputs are checked where all would take too long
    moved: int = 0  # bytes read and written at least
    flops: int = 0
    yardstick: tuple[str, Callable[[], Any]] | None = None  # the bare work, not checked
    at: Mapping[str, Any] = field(default_factory=dict)  # place on an axis of a plot

    @property
    def passes(self) -> str:
        if self.backward_alone:
            return "backward"
        return "forward + backward" if self.upstream else "forward"

    def runs(self) -> dict[str, Contender | Missing]:
        return {
            name: each if isinstance(each, Contender | Missing) else Contender(each)
            for name, each in self.contenders.items()
        }

    def call(self, contender: Contender) -> Callable[[], Outputs]:
        inputs = dict(self.inputs if contender.inputs is None else contender.inputs)
        if not self.upstream:
            return lambda: _without_gradients(contender.forward, inputs)
        if self.backward_alone:
            outputs = contender.forward(**inputs)
            return lambda: _gradients(outputs, inputs, self.upstream, self.wrt, keep=True)
        return lambda: _gradients(contender.forward(**inputs), inputs, self.upstream, self.wrt)

    def error(self, outputs: Outputs) -> float:
        """Largest error of any output, as a share of the largest true value of that output."""
        names = tuple(name for name in outputs if not name.startswith("d_"))
        truth = self._truth(names)
        worst = 0.0
        for name, value in outputs.items():
            if self.rows is not None:
                value = value[self.rows]
            true = truth[name]
            if value.shape != true.shape:
                raise ValueError(f"{name}: {list(value.shape)} instead of {list(true.shape)}")
            scale = true.abs().max().item() or 1.0
            error = (value.double() - true).abs().max().item() / scale
            worst = max(worst, error if math.isfinite(error) else math.inf)
        return worst

    def _truth(self, names: tuple[str, ...]) -> Outputs:
        """The definition of these outputs and of the gradients that flow from them alone."""
        if not hasattr(self, "_truths"):
            self._truths: dict[tuple[str, ...], Outputs] = {}
        if names not in self._truths:
            pick = (lambda x: x) if self.rows is None else (lambda x: x[self.rows])

            def wide(x: Any) -> Any:
                if not isinstance(x, Tensor):
                    return x
                return pick(x.detach()).double() if x.is_floating_point() else pick(x)

            inputs = {name: wide(value) for name, value in self.inputs.items()}
            upstream = {name: wide(value) for name, value in self.upstream.items()}
            for name in self.wrt:
                inputs[name].requires_grad_()

            outputs = self.definition(**inputs)
            outputs = {name: outputs[name] for name in names}
            if upstream:
                outputs = _gradients(outputs, inputs, upstream, self.wrt)
            self._truths[names] = {name: value.double() for name, value in outputs.items()}
        return self._truths[names]


def _without_gradients(forward: Forward, inputs: Mapping[str, Any]) -> Outputs:
    with torch.no_grad():
        return forward(**inputs)


def _gradients(
    outputs: Outputs,
    inputs: Mapping[str, Any],
    upstream: Mapping[str, Tensor],
    wrt: tuple[str, ...],
    *,
    keep: bool = False,
) -> Outputs:
    """The outputs and, as ``d_`` and its name, the gradient of each input in ``wrt``."""
    names = [name for name in outputs if name in upstream]
    grads = torch.autograd.grad(
        [outputs[name] for name in names],
        [inputs[name] for name in wrt],
        [upstream[name].to(outputs[name].dtype) for name in names],
        retain_graph=keep,
    )
    detached = {name: value.detach() for name, value in outputs.items()}
    return detached | {f"d_{name}": grad for name, grad in zip(wrt, grads, strict=True)}


# ---- time --------------------------------------------------------------------------------------


def wall_clock(run: Callable[[], Any], repeats: int) -> float:
    begin = time.perf_counter()
    for _ in range(repeats):
        run()
    return time.perf_counter() - begin


def on_threads(count: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with as many threads as ``count``, torch's and ours."""

    def run(*args: Any, **kwargs: Any) -> Any:
        torch.set_num_threads(count)
        return function(*args, **kwargs)

    return run


@dataclass(frozen=True)
class Timed:
    """What the clock runs, and how many calls of the op that is."""

    run: Callable[[], Any]
    calls: int = 1


class Alternation:
    """Rounds over several contenders; ``round()`` times each of them once, in turn.

    The first, here, finds how often a call has to be repeated, and counts where that is once.
    Each contender then gets ``seconds``, but some samples at least and not too many; those of the
    slow ones are spread over the rounds, and the very slow are left alone after the first.
    """

    def __init__(self, timed: Mapping[str, Timed], clock: Clock = wall_clock, seconds: float = 0.5):
        self.timed = dict(timed)
        self.clock = clock
        self.samples: dict[str, list[float]] = {name: [] for name in timed}
        self.repeats = dict.fromkeys(timed, 1)
        once = {name: self._time(name) for name in timed}
        self.repeats = {name: math.ceil(SHORTEST / max(t, 1e-7)) for name, t in once.items()}
        self.wanted: dict[str, int] = {}
        for name, t in once.items():
            counts = self.repeats[name] == 1
            if counts:
                self.samples[name].append(t / self.timed[name].calls)
            fit = int(seconds / (t * self.repeats[name]))
            fewest = FEWEST if t < LONGEST else 1
            self.wanted[name] = min(max(fit, fewest), MOST) - counts
        self.rounds = max(1, *self.wanted.values())
        self.done = 0

    def _time(self, name: str) -> float:
        time.sleep(PAUSE)
        run, repeats = self.timed[name].run, self.repeats[name]
        if repeats > 1:  # quick calls would time what the sleep and the others left behind
            self.clock(run, repeats)
        return self.clock(run, repeats) / repeats

    def round(self) -> None:
        names = list(self.timed)
        first = self.done % len(names)
        for name in names[first:] + names[:first]:
            before, now = ((self.done + step) * self.wanted[name] // self.rounds for step in (0, 1))
            if now > before:
                self.samples[name].append(self._time(name) / self.timed[name].calls)
        self.done += 1


def spread(samples: list[float]) -> dict[str, float]:
    """Median and quartiles, seconds."""
    several = samples if len(samples) > 1 else samples * 2
    quartiles = statistics.quantiles(several, n=4, method="inclusive")
    return dict(zip(("q1", "median", "q3"), quartiles, strict=True)) | {"samples": len(samples)}


# ---- memory ------------------------------------------------------------------------------------


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def peak_memory(run: Callable[[], Outputs], device: torch.device) -> int | None:
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
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    kept = run()
    after = _status("VmHWM")
    del kept
    return max(0, after - before)


# ---- one case ----------------------------------------------------------------------------------


class Wrong(ArithmeticError):
    """A contender's results are not the definition's: it gets no time."""


@dataclass
class Comparison:
    """A case on its way to results: contenders that were checked, in alternation."""

    results: dict[str, dict[str, Any]]
    alternation: Alternation

    def finish(self) -> list[dict[str, Any]]:
        for name, samples in self.alternation.samples.items():
            self.results[name] |= spread(samples)
        return list(self.results.values())


Batch = Callable[[list[Callable[[], Any]]], tuple[Timed, str]]


def compare(
    case: Case,
    seconds: float = 0.5,
    clock: Clock = wall_clock,
    copies: Iterable[Case] = (),
    batch: Batch | None = None,
) -> Comparison:
    """Runs every contender once, checks it, and sets those that are right against each other.

    ``seconds`` is the time for each. ``batch`` makes one thing to time, and a word for how, of the
    calls on the case and its ``copies``. An error of ours is an error; one of another contender's
    is its reason for having no time.
    """
    torch.compiler.reset()
    every = [case, *copies]
    for each in every:
        for name in each.wrt:
            each.inputs[name].requires_grad_()
    device = next(x.device for x in case.inputs.values() if isinstance(x, Tensor))
    common = {
        "op": case.op,
        "pass": case.passes,
        "workload": case.workload,
        "dtype": str(case.dtype).removeprefix("torch."),
    }
    common |= case.at
    common |= {key: value for key in ("moved", "flops") if (value := getattr(case, key))}
    results: dict[str, dict[str, Any]] = {}
    timed: dict[str, Timed] = {}
    for name, contender in case.runs().items():
        result = results[name] = common | {"contender": name}
        if isinstance(contender, Missing):
            result["reason"] = contender.reason
            continue
        try:
            runs = [each.call(each.runs()[name]) for each in every]
            outputs = runs[0]()
            result["error"] = case.error(contender.restore(outputs))
            result["output_bytes"] = sum(x.numel() * x.element_size() for x in outputs.values())
            del outputs
            if not result["error"] <= ALLOWED[case.dtype]:
                raise Wrong(f"error {result['error']:.1e}, allowed {ALLOWED[case.dtype]:.1e}")
            result["peak_bytes"] = peak_memory(runs[0], device)
            if batch is None:
                timed[name] = Timed(runs[0])
            else:
                timed[name], result["timed"] = batch(runs)
        except Exception as error:
            if name.startswith(OURS):
                raise
            lines = str(error).strip().splitlines() or [""]
            result["reason"] = f"{type(error).__name__}: {lines[0][:160]}"
    if case.yardstick is not None:
        name, run = case.yardstick
        results[name] = {key: common[key] for key in common if key != "moved"}
        results[name]["contender"] = name
        timed[name] = Timed(run)
    return Comparison(results, Alternation(timed, clock, seconds))


def compiled(forward: Forward) -> Forward:
    return torch.compile(forward, dynamic=False, fullgraph=True)


# ---- the machine -------------------------------------------------------------------------------


def last_level_cache() -> int:
    """Bytes; 0 where Linux does not say."""
    sizes = [
        int(path.read_text().strip().removesuffix("K")) * 1024
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    ]
    return max(sizes, default=0)


def _rate(units: float, run: Callable[[], Any], clock: Clock, times: int) -> float:
    run()
    return units / min(clock(run, 1) for _ in range(times))


def read_bandwidth(times: int = 5) -> float:
    """Bytes per second of the fastest of several reads of more than any cache holds."""
    x = torch.ones(max(1 << 28, 4 * last_level_cache() // 4))
    reads = (x.sum, lambda: torch.dot(x, x), x.view(torch.int32).max)
    return max(_rate(4 * x.numel(), read, wall_clock, times) for read in reads)


def copy_bandwidth(clock: Clock, times: int = 20) -> float:
    """Bytes read and written per second by a copy on the GPU."""
    x = torch.ones(1 << 29, device="cuda")
    y = torch.empty_like(x)
    return _rate(8 * x.numel(), lambda: y.copy_(x), clock, times)


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


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


def header(device: torch.device) -> dict[str, Any]:
    """What a result file says of the code, the machine and the versions."""
    facts = {
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted": bool(_git("status", "--porcelain", "--", "segkernels", "csrc")),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": _versions(PACKAGES),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "build": sk.native.extension.build_info(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        driver = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()[0]
        return facts | {
            "device": properties.name,
            "cuda": torch.version.cuda,
            "driver": driver,
            "memory": properties.total_memory,
            "l2_cache": properties.L2_cache_size,
        }
    return facts | {
        "device": "cpu",
        "isa": sk.native.extension.build_info().split(";")[0].removeprefix("isa "),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "last_level_cache": last_level_cache(),
    }


def result_file(facts: Mapping[str, Any]) -> Path:
    """One name per kind of machine and instruction set: a new run replaces the old one."""
    if facts["device"] == "cpu":
        kind = f"cpu {facts['processor']} {facts['threads']} threads {facts['isa']}"
    else:
        kind = f"gpu {facts['device']}"
    plain = "".join(c if c.isalnum() else " " for c in kind.lower())
    return RESULTS / ("-".join(plain.split()) + ".jsonl")


def write_results(path: Path, facts: Mapping[str, Any], results: Iterable[Mapping]) -> None:
    """The facts on the first line, one measurement on each further one; whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in (facts, *results))
    part = path.with_suffix(".part")
    part.write_text(text)
    part.replace(path)


def read_results(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    facts, *results = map(json.loads, path.read_text().splitlines())
    return facts, results


def result_files(prefix: str) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    for path in sorted(RESULTS.glob(f"{prefix}-*.jsonl")):
        yield read_results(path)
