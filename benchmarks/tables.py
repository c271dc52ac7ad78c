"""Tables and plots from the result files: ``python benchmarks/tables.py``.

Rewrites what stands between the markers in README.md and docs/benchmarks.md, and the plots. Nothing
there is written by hand; a goal without a result file says "not yet measured".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from harness import OURS, ROOT, result_files

from segrlhf.charts import Line, line_chart
from segrlhf.tables import Table, number

Result = Mapping[str, Any]
Key = tuple[str, str, str, str]  # op, pass, workload, dtype
Case = dict[str, Result]  # by contender

UNMEASURED = "not yet measured"


# ---- numbers -----------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{number(seconds / size)} {unit}"
    return f"{number(seconds / 1e-6)} µs"


def memory(count: float) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20)):
        if count >= size:
            return f"{number(count / size)} {unit}"
    return f"{count / 1024:.0f} KiB"


@dataclass(frozen=True)
class File:
    """The results of one kind of machine."""

    facts: Mapping[str, Any]
    results: Sequence[Result]

    @cached_property
    def cases(self) -> dict[Key, Case]:
        """In the order of the file."""
        out: dict[Key, Case] = {}
        for result in self.results:
            key = (result["op"], result["pass"], result["workload"], result["dtype"])
            out.setdefault(key, {})[result["contender"]] = result
        return out

    @property
    def name(self) -> str:
        on_cpu = self.facts["device"] == "cpu"
        return self.facts["isa"].upper() if on_cpu else self.facts["device"]

    @property
    def bandwidth(self) -> tuple[str, float]:
        kind = "read" if self.facts["device"] == "cpu" else "copy"
        return kind, self.facts[f"{kind}_bandwidth"]

    @property
    def cache(self) -> int:
        return self.facts["last_level_cache" if self.facts["device"] == "cpu" else "l2_cache"]


def share(file: File, result: Result, case: Case) -> str:
    """Of the machine's bandwidth, or of the bare product's rate in the same rounds."""
    for name, bare in case.items():
        if "bare product" in name:
            return f"{number(result['median'] / bare['median'])}x {name}"
    if "moved" not in result:
        return ""
    rate = result["moved"] / result["median"]
    if result["moved"] < file.cache:
        return f"{number(rate / 1e9)} GB/s, in cache"
    kind, bandwidth = file.bandwidth
    return f"{rate / bandwidth:.0%} of the {kind} bandwidth"


def _row(file: File, result: Result, case: Case) -> list[str]:
    if "median" not in result:
        return [result["contender"], result["reason"][:80], "", "", "", "", ""]
    ours = case.get(OURS, {}).get("median")
    extra = result.get("peak_bytes")
    spread = (result["q3"] - result["q1"]) / 2 / result["median"]
    return [
        result["contender"],
        duration(result["median"]),
        f"±{spread:.0%}" if result.get("samples", 2) > 1 else "one call",
        "" if ours is None else f"{number(result['median'] / ours)}x",
        share(file, result, case),
        "" if extra is None else memory(max(0, extra - result["output_bytes"])),
        f"{result['error']:.0e}" if "error" in result else "",
    ]


COLUMNS = ["contender", "time", "spread", "of ours", "share", "memory", "error"]


def machine(file: File) -> str:
    """One line: what ran, where, and with which versions."""
    facts = file.facts
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    if facts["device"] == "cpu":
        what = (
            f"{facts['processor']}, {facts['threads']} threads, {facts['isa']} "
            f"(torch: {facts['torch_isa']}), last-level cache {memory(facts['last_level_cache'])}, "
            f"read bandwidth {facts['read_bandwidth'] / 1e9:.1f} GB/s"
        )
    else:
        what = (
            f"{facts['device']}, driver {facts['driver']}, CUDA {facts['cuda']}, "
            f"copy bandwidth {facts['copy_bandwidth'] / 1e9:,.0f} GB/s"
        )
    commit = facts["commit"][:10] + (" with uncommitted changes" if facts["uncommitted"] else "")
    return f"{what}; {versions}; commit {commit}, {facts['date'][:10]}"


def text(file: File) -> str:
    """Everything measured, for the terminal."""
    parts = [machine(file)]
    for key, case in file.cases.items():
        rows = [_row(file, result, case) for result in case.values()]
        parts.append(f"{', '.join(key)}\n{Table(COLUMNS, rows).text()}")
    return "\n\n".join(parts)


# ---- goals -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Goal:
    """A number to reach, measured on the worst of the cases that it speaks of."""

    what: str
    goal: str
    op: str
    passes: str
    workload: str  # a part of the case's workload
    dtype: str
    measure: Callable[[File, Case], float | str | None]
    bound: float
    at_least: bool = True
    unit: str = "x"

    def measured(self, file: File) -> str:
        found: list[float] = []
        for (op, passes, workload, dtype), case in file.cases.items():
            if (op, passes, dtype) == (self.op, self.passes, self.dtype) and (
                re.search(self.workload, workload)
            ):
                value = self.measure(file, case)
                if isinstance(value, str):
                    return value
                if value is not None:
                    found.append(value)
        if not found:
            return UNMEASURED
        worst = min(found) if self.at_least else max(found)
        reached = worst >= self.bound if self.at_least else worst <= self.bound
        shown = f"{worst:.0%}" if self.unit == "%" else f"{number(worst)}{self.unit}"
        return shown if reached else f"{shown}, missed"


def against(name: str):
    """How many times the contender's time is ours."""

    def measure(_: File, case: Case) -> float | str | None:
        if OURS not in case or name not in case:
            return None
        if "median" not in case[name]:
            return f"no time: {case[name]['reason']}"
        return case[name]["median"] / case[OURS]["median"]

    return measure


def against_best_peer(_: File, case: Case) -> float | None:
    """The quickest of all others that compute the same: textbook forms and torch.compile too."""
    others = [
        result["median"]
        for name, result in case.items()
        if "median" in result
        and not name.startswith((OURS, "reference"))
        and not name.endswith(("alone", "bare product", "bare products"))
    ]
    return min(others) / case[OURS]["median"] if others and OURS in case else None


def over(name: str):
    """How many times the contender's time we take."""

    def measure(file: File, case: Case) -> float | str | None:
        times = against(name)(file, case)
        return 1 / times if isinstance(times, float) else times

    return measure


def bandwidth(file: File, case: Case) -> float | None:
    if OURS not in case:
        return None
    return case[OURS]["moved"] / case[OURS]["median"] / file.bandwidth[1]


def elements(size: int):
    def measure(_: File, case: Case) -> float | None:
        if OURS not in case:
            return None
        return case[OURS]["moved"] / size / case[OURS]["median"] / 1e9

    return measure


def workspace(_: File, case: Case) -> float | None:
    ours = case.get(OURS, {})
    if ours.get("peak_bytes") is None:
        return None
    return max(0, ours["peak_bytes"] - ours["output_bytes"]) / 2**20


def microseconds(_: File, case: Case) -> float | None:
    return case[OURS]["median"] * 1e6 if OURS in case else None


def cores(_: File, case: Case) -> float | None:
    one = case.get(f"{OURS}, 1 thread")
    more = [r for name, r in case.items() if re.fullmatch(f"{OURS}, \\d+ threads", name)]
    return one["median"] / more[-1]["median"] if one and more else None


FWD, BOTH = "forward", "forward + backward"
ENTROPY, STATS = "entropy_from_logits", "logprobs_and_entropy"
LINEAR, LINEAR_LOSS = "linear_logprobs_and_entropy", "linear_policy_loss"
PATH = "boundaries to advantages"
VOCABS = r"^[\d,]+ x (32,064|151,936)$"
LOGITS = "V = 32,064 and 151,936"

CPU_GOALS = (
    *(
        Goal(f"entropy, {LOGITS}, fp32", goal, ENTROPY, FWD, VOCABS, "float32", *rest)
        for goal, *rest in (
            ("at least 5x torch.compile", against("torch.compile"), 5),
            ("at least 20x eager", against("eager"), 20),
            ("at least half of the read bandwidth", bandwidth, 0.5, True, "%"),
        )
    ),
    *(
        Goal(f"entropy, {LOGITS}, bf16", goal, ENTROPY, FWD, VOCABS, "bfloat16", *rest)
        for goal, *rest in (
            ("at least 4x torch.compile", against("torch.compile"), 4),
            ("at least 5x eager", against("eager"), 5),
            ("at least 4 G elements/s", elements(2), 4, True, " G/s"),
        )
    ),
    *(
        Goal(
            f"log-prob + entropy, forward + backward, {LOGITS}, {short}",
            "at least 4x the best peer",
            *(STATS, BOTH, VOCABS, dtype, against_best_peer, 4),
        )
        for short, dtype in (("fp32", "float32"), ("bf16", "bfloat16"))
    ),
    Goal(
        "linear form, 256 x 1,024 x 32,000, fp32, forward",
        "at most 1.08x one bare product",
        *(LINEAR, FWD, "^256 x 1,024 x 32,000", "float32", over("one bare product"), 1.08, False),
    ),
    Goal(
        "same, forward + backward",
        "at most 1.1x four bare products",
        *(LINEAR, BOTH, "^256 x 1,024 x 32,000", "float32", over("four bare products"), 1.1, False),
    ),
    Goal(
        "same, extra memory, forward + backward",
        "at most 64 MiB",
        *(LINEAR, BOTH, "^256 x 1,024 x 32,000", "float32", workspace, 64, False, " MiB"),
    ),
    *(
        Goal(
            f"linear form, {shape}, bf16 weights, {passes}",
            "at least 3x torch's own bf16 path",
            *(LINEAR, passes, f"^{shape}", "bfloat16", against("eager"), 3),
        )
        for passes, shape in ((FWD, "256 x 1,024 x 32,000"), (BOTH, "64 x 1,024 x 32,000"))
    ),
    *(
        Goal(f"{PATH}, 64 x 1,024", goal, PATH, FWD, "^uniform, 64 rows", "float32", measure, bound)
        for goal, measure, bound in (
            ("at least 1,000x Python loops", against("Python loops over tokens"), 1000),
            ("at least 100x a GAE loop over time", against("eager, GAE loops over time"), 100),
            ("at least 10x fully vectorised", against("eager, GAE as a matrix"), 10),
        )
    ),
    Goal(
        "entropy, 4,096 x 32,064, fp32, 1 to 2 cores",
        "at least 1.8x",
        *(ENTROPY, FWD, "^4,096 x 32,064", "float32", cores, 1.8),
    ),
    Goal(
        "log-prob + entropy, forward + backward, 2,048 x 32,064, 1 to 2 cores",
        "at least 1.8x",
        *(STATS, BOTH, "^2,048 x 32,064", "float32", cores, 1.8),
    ),
    Goal(
        f"{PATH}, 1,024 x 1,024, 1 to 2 cores",
        "at least 1.8x",
        *(PATH, FWD, "^uniform, 1,024 rows", "float32", cores, 1.8),
    ),
)


def since_none_gated(file: File, case: Case) -> float | None:
    """Share of the time that the same loss takes when no row is gated."""
    if OURS not in case:
        return None
    op, passes, workload, dtype = (case[OURS][name] for name in ("op", "pass", "workload", "dtype"))
    none = file.cases.get((op, passes, re.sub(r"\d+% gated", "0% gated", workload), dtype))
    return case[OURS]["median"] / none[OURS]["median"] if none else None


def launches(_: File, case: Case) -> float | str | None:
    ours = case.get(OURS, {})
    if "launches" not in ours:
        return None
    return "synchronises" if ours["synchronises"] else float(ours["launches"])


BF16 = "bfloat16"
SHAPE = "8,192 x 4,096 x 131,072"
GPU_GOALS = (
    Goal(
        "entropy, forward, 8,192 x 151,936, bf16",
        "at least 90 % of the copy bandwidth",
        *(ENTROPY, FWD, "^8,192 x 151,936", BF16, bandwidth, 0.9, True, "%"),
    ),
    Goal(
        "entropy + log-prob, backward, same",
        "at least 85 %",
        *(STATS, "backward", "^8,192 x 151,936", BF16, bandwidth, 0.85, True, "%"),
    ),
    Goal(
        f"linear form, forward, {SHAPE}, bf16",
        "at most 1.10x the bare product",
        *(LINEAR, FWD, f"^{SHAPE}", BF16, over("one bare product"), 1.1, False),
    ),
    Goal(
        "linear form, forward + backward, same",
        "at most 1.12x four bare products",
        *(LINEAR, BOTH, f"^{SHAPE}", BF16, over("four bare products"), 1.12, False),
    ),
    Goal(
        "linear_policy_loss, forward + backward, same",
        "at most 0.85x Liger's time",
        *(LINEAR_LOSS, BOTH, f"^{SHAPE}, 0%", BF16, over("Liger"), 0.85, False),
    ),
    *(
        Goal(
            f"same, {gated} of the rows gated",
            f"at most {most:.0%} of the time with none: two of three products shrink",
            *(LINEAR_LOSS, BOTH, f"^{SHAPE}, {gated}", BF16, since_none_gated, most, False, "%"),
        )
        for gated, most in (("50%", 0.7), ("90%", 0.45))
    ),
    Goal(
        f"{PATH}, 512 x 4,096",
        "at most 20 µs of device time",
        *(PATH, FWD, "^uniform, 512 rows", "float32", microseconds, 20, False, " µs"),
    ),
    Goal(
        f"{PATH}, 16M tokens",
        "at least 65 % of the copy bandwidth",
        *(PATH, FWD, "^uniform, 4,096 rows", "float32", bandwidth, 0.65, True, "%"),
    ),
    *(
        Goal(
            f"Bradley-Terry, {passes}",
            f"{most} launch{'es' * (most > 1)}, no synchronisation",
            *("segment_bradley_terry", passes, "^uniform", "float32", launches, most, False, ""),
        )
        for passes, most in ((FWD, 1), (BOTH, 2))
    ),
    *(
        Goal(
            f"{op}, {BOTH}, extra memory",
            "at most 512 MiB",
            *(op, BOTH, f"^{SHAPE}", BF16, workspace, 512, False, " MiB"),
        )
        for op in (LINEAR, LINEAR_LOSS)
    ),
)


def _goal_table(goals: Iterable[Goal], files: Sequence[File]) -> str:
    rows: list[list[str]] = []
    what = ""
    for goal in goals:
        measured = [goal.measured(file) for file in files] or [UNMEASURED]
        rows.append(["" if goal.what == what else goal.what, goal.goal, *measured])
        what = goal.what
    return Table(["", "goal", *([file.name for file in files] or ["measured"])], rows).markdown()


# ---- documents ---------------------------------------------------------------------------------


def _glance(file: File) -> str:
    """Our time beside everybody's, one line a case."""
    rows = []
    for key, case in file.cases.items():
        if OURS not in case:
            continue

        def best_of(*names: str, case: Case = case) -> str:
            times = [r["median"] for n, r in case.items() if n.startswith(names) and "median" in r]
            return f"{number(min(times) / case[OURS]['median'])}x" if times else ""

        rows.append(
            [
                ", ".join(key),
                duration(case[OURS]["median"]),
                share(file, case[OURS], case),
                best_of("torch.compile"),
                best_of("eager"),
                best_of("TRL", "verl", "Liger"),
            ]
        )
    columns = ["", OURS, "share", "torch.compile", "eager", "best of TRL, verl, Liger"]
    return f"{machine(file)}.\n\n{Table(columns, rows).markdown()}"


def _everything(file: File) -> str:
    parts = [f"### {file.name}", machine(file) + "."]
    for key, case in file.cases.items():
        rows = [_row(file, result, case) for result in case.values()]
        parts.append(f"{', '.join(key)}:\n\n{Table(COLUMNS, rows).markdown()}")
    return "\n\n".join(parts)


@dataclass(frozen=True)
class Plot:
    name: str
    op: str
    passes: str
    axis: str
    lines: Sequence[Line]

    @property
    def title(self) -> str:
        return f"{self.op}, {self.passes}, against {self.axis}"

    @cached_property
    def svg(self) -> str:
        return line_chart(
            self.lines,
            title=f"{self.op}, {self.passes}",
            x_label=f"{self.axis} (thousands)",
            y_label="milliseconds",
        )


def plots(file: File) -> Iterator[Plot]:
    """Time against tokens and vocabulary, on one core and on all."""
    lines: dict[tuple[str, str, str], dict[str, list[tuple[float, float]]]] = {}
    for result in file.results:
        if "axis" in result:
            chart = lines.setdefault((result["op"], result["pass"], result["axis"]), {})
            point = (result["x"] / 1000, result["median"] * 1000)
            chart.setdefault(result["contender"], []).append(point)
    for (op, passes, axis), chart in lines.items():
        name = "-".join(re.findall(r"[a-z]+", f"{op} {passes} {axis}".lower()))
        series = [Line(contender, sorted(points)) for contender, points in chart.items()]
        yield Plot(f"benchmark-{name}.svg", op, passes, axis, series)


def files(device: str) -> list[File]:
    """AVX2 first, which the goals are set for."""
    found = [File(*contents) for contents in result_files(device)]
    return sorted(found, key=lambda file: file.name != "AVX2")


def blocks() -> dict[str, str]:
    """What belongs between each pair of markers."""
    cpu, gpu = files("cpu"), files("gpu")
    first = cpu[:1]
    made = {
        "goals cpu": _goal_table(CPU_GOALS, cpu),
        "goals gpu": _goal_table(GPU_GOALS, gpu),
        "glance": "\n\n".join(map(_glance, first)),
        "plots": "\n".join(
            f"![{plot.title}](images/{plot.name})" for file in first for plot in plots(file)
        ),
        "results cpu": "\n\n".join(map(_everything, cpu)),
        "results gpu": "\n\n".join(map(_everything, gpu)),
    }
    return {name: block or f"{UNMEASURED.capitalize()}." for name, block in made.items()}


def rewritten(document: str) -> str:
    """The document with everything between its markers made anew."""
    for name, block in blocks().items():
        mark = f"<!-- benchmarks: {name} -->\n"
        between = rf"{mark}.*?<!-- end -->"
        new = f"{mark}\n{block}\n\n<!-- end -->"
        document = re.sub(between, lambda _, new=new: new, document, flags=re.DOTALL)
    return document


DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md")
IMAGES = ROOT / "docs" / "images"


def main() -> None:
    for path in DOCUMENTS:
        path.write_text(rewritten(path.read_text()))
    for file in files("cpu")[:1]:
        for plot in plots(file):
            (IMAGES / plot.name).write_text(plot.svg)


if __name__ == "__main__":
    main()
