"""Results as tables of text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from result_file import File, Measured, Result


def number(value: float, digits: int = 3) -> str:
    """So many significant digits, never in exponents."""
    if value == 0:
        return "0"
    decimals = max(digits - 1 - math.floor(math.log10(abs(value))), 0)
    return f"{value:.{min(decimals, 4)}f}"


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
class Table:
    """Text cells, the first column to the left and the others to the right."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        def line(cells: Iterable[str]) -> str:
            return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

        rule = "|---|" + "---:|" * (len(self.columns) - 1)
        return "\n".join([line(self.columns), rule, *map(line, self.rows)])

    def text(self) -> str:
        cells = [list(self.columns), *map(list, self.rows)]
        widths = [max(len(row[k]) for row in cells) for k in range(len(self.columns))]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if k == 0 else cell.rjust(width)
                for k, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in cells
        )


def share(file: File, result: Result, case: Measured) -> str:
    """Of the machine's bandwidth, or of the bare product's rate in the same rounds."""
    for bare in case.all(role="bare"):
        if "products" in bare:
            return f"{number(result['median'] / bare['median'])}x {bare['name']}"
    moved = case.line.get("moved")
    if moved is None or result["role"] == "bare":
        return ""
    rate = moved / result["median"]
    if moved < file.cache:
        return f"{number(rate / 1e9)} GB/s, in cache"
    kind, bandwidth = file.bandwidth
    return "" if bandwidth is None else f"{rate / bandwidth:.0%} of the {kind} bandwidth"


def _timed(result: Result, case: Measured) -> list[str]:
    ours = case.ours
    spread = (result["q3"] - result["q1"]) / 2 / result["median"]
    return [
        result["name"],
        duration(result["median"]),
        f"±{spread:.0%}" if result["samples"] > 1 else "one call",
        "" if ours is None else f"{number(result['median'] / ours['median'])}x",
    ]


def _row(file: File, result: Result, case: Measured) -> list[str]:
    if "median" not in result:
        return [result["name"], result["reason"][:80], "", "", "", "", ""]
    extra = result.get("peak_bytes")
    return [
        *_timed(result, case),
        share(file, result, case),
        "" if extra is None else memory(max(0, extra - result["output_bytes"])),
        f"{result['error']:.0e}" if "error" in result else "",
    ]


COLUMNS = ["contender", "time", "spread", "of ours", "share", "memory", "error"]


def _trained(result: Result, case: Measured) -> list[str]:
    """Of a case of bench_training.py."""
    if "median" not in result:
        return [result["name"], result["reason"][:80], *[""] * (len(TRAINED) - 2)]
    errors = ("loss_error", "gradient_error")
    peak = result["peak_bytes"]
    return [
        *_timed(result, case),
        number(case.shape["pairs"] / result["median"]),
        f"{result['tokens']:,}",
        "" if peak is None else memory(peak),
        *(f"{result[error]:.0e}" if error in result else "" for error in errors),
    ]


TRAINED = ["trainer", "time", "spread", "of ours", "pairs/s", "tokens read", "peak memory"]
TRAINED += ["loss error", "gradient error"]


def of_case(file: File, case: Measured) -> Table:
    if "batch" in case.shape:
        return Table(TRAINED, [_trained(result, case) for result in case.contenders])
    return Table(COLUMNS, [_row(file, result, case) for result in case.contenders])


def machine(file: File) -> str:
    """One line: what ran, where, and with which versions."""
    facts = file.facts
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    kind, bandwidth = file.bandwidth
    rate = "not measured" if bandwidth is None else f"{number(bandwidth / 1e9)} GB/s"
    if file.on_cpu:
        what = (
            f"{facts['processor']}, {facts['threads']} threads, {facts['isa']} "
            f"(torch: {facts['torch_isa']}), last-level cache {memory(facts['last_level_cache'])}"
        )
    else:
        what = f"{facts['device']}, driver {facts['driver'] or 'unknown'}, CUDA {facts['cuda']}"
    commit = "unknown" if facts["commit"] is None else facts["commit"][:10]
    if facts["uncommitted"]:
        commit += " with uncommitted changes"
    return f"{what}, {kind} bandwidth {rate}; {versions}; commit {commit}, {facts['date'][:10]}"


def glance(file: File) -> Table:
    """Our time beside everybody's, one line a case."""
    rows = []
    for case in file.cases:
        ours = case.ours
        if ours is None:
            continue

        def best(*results: Result, ours: Result = ours) -> str:
            times = [result["median"] for result in results if "median" in result]
            return f"{number(min(times) / ours['median'])}x" if times else ""

        rows.append(
            [
                case.title,
                duration(ours["median"]),
                share(file, ours, case),
                best(*case.all(role="compiled")),
                best(*case.all(role="textbook")),
                best(*(peer for peer in case.all(role="peer") if not peer.get("partial"))),
            ]
        )
    return Table(["", "segkernels", "share", "torch.compile", "eager", "best peer"], rows)


def text(file: File) -> str:
    """Everything measured, for the terminal."""
    parts = [f"{case.title}\n{of_case(file, case).text()}" for case in file.cases]
    return "\n\n".join([machine(file), *parts])
