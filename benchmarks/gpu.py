"""``make gpu``: build, benchmarks, tests and compute-sanitizer on an NVIDIA GPU, in eight minutes.

Runs from a plain checkout under an interpreter that has torch and Triton, and uses pybind11, CMake,
pytest, hypothesis, nvcc, compute-sanitizer and git where they are. Every result is on the disk as
soon as it is known; a step or case that fails, crashes or takes too long is reported and costs
nothing else. Without a GPU everything is walked on small inputs on the CPU; the exit status is then
1, or 0 with --dry-run.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import documents
import goals
import result_file
from gpu_sweep import ROW_KERNELS, recommendation
from gpu_worker import Failed, Workers, execute
from tables import duration, share

ROOT = Path(__file__).resolve().parent.parent
# In a folder of its own: CMake remembers its options, and the next build may want others.
BUILD = (*(sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"), "--build-temp")
WORKER = (sys.executable, str(ROOT / "benchmarks" / "gpu_cases.py"))
PYTEST = (sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider")

# Seconds at most. Of the build's, the last 40 are for the form without the CUDA module.
LIMITS = {
    "machine": 60,
    "build": 150,
    "peers": 60,
    "smoke": 30,
    "case": 60,
    "tests": 100,
    "memcheck": 50,
    "racecheck": 50,
    "sweep": 60,
}
LAST_BUILD = 40
REPORT = 5  # seconds kept for the end
LEAST = 10  # seconds without which no case begins


class Run:
    """One run: its options, the time left, and where everything is written."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.dry = options.dry_run
        self.deadline = time.monotonic() + options.minutes * 60 - REPORT
        scratch = options.out or ROOT / "build" / "gpu"
        scratch.mkdir(parents=True, exist_ok=True)
        self.log = scratch / "gpu.log"
        self.log.write_text("")
        self.out = options.out or (scratch if self.dry else result_file.RESULTS)
        self.peers = ROOT / "build" / "gpu" / "peers"
        self.path: Path | None = None
        self.cases: dict[str, bool] = {}  # by name, whether a goal is held against it
        self.failed: list[str] = []
        self.workers = self._workers()

    def _workers(self) -> Workers:
        flags = ["--dry-run"] if self.dry else []
        flags += ["--peers", str(self.peers)] if self.peers.is_dir() else []
        # Liger would let the host wait for the device to check each call's targets.
        variables = {"LIGER_SCALED_CE_SM90_VALIDATE_TARGETS": "0"}
        if self.dry:
            variables["TRITON_INTERPRET"] = "1"  # the row kernels' sweep has no other form
        return Workers([*WORKER, *flags], self.log, **variables)

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    @property
    def before_the_sweep(self) -> float:
        """What is left for the steps that must leave its time to the sweep."""
        kept = LIMITS["sweep"] if "sweep" in self.options.steps and not self.dry else 0
        return self.left - kept

    def within(self, name: str) -> float:
        return min(LIMITS[name], self.left)

    def checking(self, name: str) -> float:
        return min(LIMITS[name], self.before_the_sweep)

    def begin(self, facts: dict[str, Any]) -> None:
        """Opens the result file: its header is on the disk before anything else is tried."""
        self.path = self.out / result_file.file_name(facts)
        result_file.write(self.path, facts, ())

    def record(self, line: dict[str, Any]) -> None:
        assert self.path is not None
        result_file.append(self.path, line)

    def fails(self, name: str, reason: str) -> None:
        print(f"{name}: FAILED: {reason}", flush=True)
        self.failed.append(f"{name}: {reason}")

    def execute(
        self, command: Iterable[str], seconds: float, telling: str = "", **environment: str
    ) -> str:
        """Runs a command in the repository; the last line that it wrote. A failure comes with that
        line, or with the first one that has the word ``telling``."""
        begin = self.log.stat().st_size
        failure = None
        try:
            with self.log.open("a") as log:
                execute([*command], seconds, log, cwd=ROOT, **environment)
        except Failed as error:
            failure = error
        with self.log.open(errors="replace") as log:
            log.seek(begin)
            lines = [line.strip() for line in log if line.strip()][1:]  # the first is the command
        last = lines[-1] if lines else ""
        if failure is None:
            return last
        told = next((x for x in lines if telling and telling in x.lower()), last)
        raise Failed(f"{failure}: {told[:200]}" if told else str(failure))


# ---- steps: each gives a word on how it went, or raises Failed ---------------------------------


def machine(run: Run) -> str:
    for copy in (True, False):
        try:
            found = run.workers.run({"job": "facts", "copy": copy}, LIMITS["machine"], False)
        except Failed as error:
            run.fails("machine", str(error))
            continue
        run.cases = found["cases"]
        run.begin(found["facts"])
        if found["facts"]["device"] == "none" and not run.dry:
            run.dry = True
            run.workers = run._workers()
            run.failed.append("machine: there is no GPU; everything was walked without one")
        return found["facts"]["device"]
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    unknown = {"commit": None, "uncommitted": None, "versions": {}, "device": "unknown"}
    run.begin({**unknown, "date": now, "cuda": None, "driver": None})
    raise Failed("neither torch nor the GPU can be asked what they are")


def build(run: Run) -> str:
    ways = {
        "with warnings as errors": "-DSEGK_CUDA=ON -DSEGK_STRICT=ON",
        "without warnings as errors": "-DSEGK_CUDA=ON -DSEGK_STRICT=OFF",
        "without the CUDA module": "-DSEGK_CUDA=OFF",
    }
    if run.dry:  # CUDA kernels are not walked
        ways = dict(list(ways.items())[-1:])
    end = time.monotonic() + run.within("build")
    failures = []
    for way, flags in ways.items():
        last = way == "without the CUDA module"
        if last and not run.dry:
            for old in (ROOT / "segkernels").glob("_cuda*.so"):
                old.unlink()  # of other sources than those that are measured
        seconds = end - time.monotonic() - (0 if last else LAST_BUILD)
        if seconds <= 0:
            failures.append(f"{way}: no time was left")
            continue
        options = f"{os.environ.get('CMAKE_ARGS', '')} {flags}".strip()
        try:
            command = [*BUILD, str(ROOT / "build" / "gpu")]
            run.execute(command, seconds, telling="error", CMAKE_ARGS=options)
        except Failed as error:
            failures.append(f"{way}: {error}")
            continue
        if failures:
            run.fails("build", "; ".join(failures))
        return f"built {way}"
    raise Failed("; ".join(failures))


def peers(run: Run) -> str:
    if run.options.wheels is None:
        return "skipped: no folder of wheels was named"
    wheels = sorted(str(path.resolve()) for path in run.options.wheels.glob("*.whl"))
    if not wheels:
        raise Failed(f"{run.options.wheels}: expected wheels, found none")
    shutil.rmtree(run.peers, ignore_errors=True)
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps")
    failures = []
    for wheel in wheels:
        try:
            run.execute([*pip, "--target", str(run.peers), wheel], run.within("peers"))
        except Failed as error:
            failures.append(f"{Path(wheel).name}: {error}")
    run.workers = run._workers()
    if failures:
        raise Failed("; ".join(failures))
    return f"{len(wheels)} wheels"


def smoke(run: Run) -> str:
    found = run.workers.run({"job": "smoke"}, run.within("smoke"))
    run.record({"smoke": found})
    if found["cuda_missing"]:
        return f"without CUDA kernels: {found['cuda_missing'][:200]}"
    return "every kind of kernel is right"


OURS, ROUNDS = "segkernels", "the rounds"  # as workers say


def _measure(run: Run, name: str, everybody: bool, left: Callable[[], float]) -> None:
    """Records a case, or why there is none. Whoever takes the process down is left out of the next
    try."""
    without: dict[str, str] = {}
    while True:
        request = {"job": name, "everybody": everybody, "without": without}
        try:
            line = run.workers.run(request, min(LIMITS["case"], left()))
        except Failed as error:
            culprit = error.at
            print(f"{name}: {error}, at {culprit or 'the start'}", flush=True)
            if culprit == ROUNDS and everybody:
                everybody, without = False, {}
            elif culprit == ROUNDS and goals.LIGER not in without:
                without = {goals.LIGER: "left out, because the rounds failed"}
            elif culprit in ("", OURS, ROUNDS, *without) or left() < LEAST:
                run.fails(name, f"{error}, at {culprit or 'the start'}")
                run.record({"case": name, "failed": str(error), "at": culprit})
                return
            else:
                without = {**without, culprit: f"ended the process: {error}"}
            continue
        run.record(line)
        file = result_file.File(result_file.read(run.path).facts, [line])
        [case] = file.cases
        said = "" if case.ours is None else duration(case.ours["median"])
        print(f"{name}: {said} {share(file, case.ours, case)}", flush=True)
        return


def _cases(run: Run, names: Iterable[str], everybody: bool, left: Callable[[], float]) -> str:
    left_out = []
    for name in names:
        if left() < LEAST:
            left_out.append(name)
        else:
            _measure(run, name, everybody, left)
    if left_out:
        raise Failed(f"no time was left for {', '.join(left_out)}")
    return "done"


def goal_cases(run: Run) -> str:
    names = [name for name, goal in run.cases.items() if goal]
    return _cases(run, names, False, lambda: run.left)


def all_cases(run: Run) -> str:
    return _cases(run, run.cases, True, lambda: run.before_the_sweep)


def tests(run: Run) -> str:
    # The kernels' tests; those of the training layer need packages that kernels do not.
    command = [*PYTEST, "--ignore=tests/segrlhf", "--continue-on-collection-errors"]
    if run.dry:
        return run.execute([*command, "--collect-only"], run.checking("tests"))
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(os.cpu_count())]
    return run.execute(command, run.checking("tests"), SEGKERNELS_REQUIRE="cuda,triton")


# Every op of tests/test_cuda.py on long, short and misaligned rows.
SANITIZED = ("tests/test_cuda.py", "-k", "reruns_are_identical or memory_that_is_not_aligned")


def _sanitizer(tool: str) -> Callable[[Run], str]:
    def step(run: Run) -> str:
        if run.dry:
            return run.execute([*PYTEST, "--collect-only", *SANITIZED], run.checking(tool))
        # torch's allocator hands out parts of large blocks, between which nothing is out of bounds.
        return run.execute(
            ["compute-sanitizer", f"--tool={tool}", "--error-exitcode=1", *PYTEST, *SANITIZED],
            run.checking(tool),
            SEGKERNELS_REQUIRE="cuda,triton",
            PYTORCH_NO_CUDA_MEMORY_CACHING="1",
        )

    return step


def sweep(run: Run) -> str:
    end = time.monotonic() + run.within("sweep")
    kernels = ROW_KERNELS[:1] if run.dry else ROW_KERNELS
    requests: list[dict[str, Any]] = [{"job": "sweep tiles"}]
    requests += [{"job": "sweep row kernels", "sizes": sizes} for sizes in kernels]
    found, failures = [], []
    for request in requests:
        sizes = str(request.get("sizes", "tiles"))
        if end - time.monotonic() < 5:
            failures.append(f"{sizes}: no time was left")
            continue
        try:
            line = run.workers.run(request, end - time.monotonic(), request is not requests[-1])
        except Failed as error:
            failures.append(f"{sizes}: {error}")
            continue
        run.record(line)
        found.append(line)
    bandwidth = result_file.read(run.path).facts.get("copy_bandwidth")
    print(recommendation(found, bandwidth))
    if failures:
        raise Failed("; ".join(failures))
    return "done"


STEPS: dict[str, Callable[[Run], str]] = {
    "machine": machine,
    "build": build,
    "peers": peers,
    "smoke": smoke,
    "goals": goal_cases,
    "tests": tests,
    "memcheck": _sanitizer("memcheck"),
    "racecheck": _sanitizer("racecheck"),
    "everybody": all_cases,
    "sweep": sweep,
}


# ---- the run -----------------------------------------------------------------------------------


def take(run: Run, name: str) -> None:
    """Takes a step, and records how it went."""
    begin = time.monotonic()
    where = run.log.stat().st_size
    print(f"== {name} ({run.left:.0f} s left)", flush=True)
    line: dict[str, Any] = {"step": name}
    try:
        if run.left <= 0 and run.path is not None:
            raise Failed("no time was left")
        line["passed"] = STEPS[name](run)
        print(f"{name}: {line['passed']}", flush=True)
    except Failed as error:
        line["failed"] = str(error)
        with run.log.open(errors="replace") as log:
            log.seek(where)
            print("".join(log.readlines()[-15:])[-1500:], end="")
        run.fails(name, str(error))
    finally:
        run.workers.close()
    run.record(line | {"seconds": time.monotonic() - begin})


def report(run: Run) -> None:
    """The last lines of a run: what failed, and the goals."""
    if run.path is None:
        return
    file = result_file.read(run.path)
    print(f"\nresults: {run.path}\nlog: {run.log}")
    for failure in run.failed[:20]:
        print(f"FAILED: {failure[:200]}")
    print(goals.table(goals.GPU_GOALS, [file]).text(), flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dry-run", action="store_true", help="walk, and succeed, without a GPU")
    parser.add_argument("--minutes", type=float, default=8, help="for everything (default 8)")
    parser.add_argument(
        "--out", type=Path, help="folder for results and log; documents are then left as they are"
    )
    parser.add_argument("--wheels", type=Path, help="folder of peers that are not installed")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    options = parser.parse_args(arguments)
    options.steps = ["machine", *(name for name in options.steps if name != "machine")]

    run = Run(options)
    try:
        for name in options.steps:
            take(run, name)
        if options.out is None and not run.dry:
            documents.rewrite()
    except KeyboardInterrupt:
        run.failed.append("interrupted")
    finally:
        report(run)
    return 1 if run.failed else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
