"""Result files: JSON lines, the machine's facts first, then one line a case.

``make gpu`` also writes a line a step, one for each case that failed, and what its sweep found.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"

Result = Mapping[str, Any]  # a contender's numbers, or why it has none


@dataclass(frozen=True)
class Measured:
    """A case and everybody's results."""

    line: Mapping[str, Any]

    @property
    def shape(self) -> Mapping[str, Any]:
        return self.line["shape"]

    @property
    def contenders(self) -> Sequence[Result]:
        return self.line["contenders"]

    @property
    def title(self) -> str:
        parts = (self.line["op"], self.line["pass"], describe(self.shape), self.line["dtype"])
        return ", ".join(parts)

    @property
    def ours(self) -> Result | None:
        """With as many threads as the process had."""
        return self.find(role="ours", threads=None)

    def find(self, **fields: Any) -> Result | None:
        """The first contender with these fields that has a time, else the first with them."""
        found = self.all(**fields)
        return next((each for each in found if "median" in each), found[0] if found else None)

    def all(self, **fields: Any) -> list[Result]:
        return [
            each
            for each in self.contenders
            if all(each.get(name) == value for name, value in fields.items())
        ]


def describe(shape: Mapping[str, Any]) -> str:
    """The shape of a case in words."""
    size = {name: f"{x:,}" if isinstance(x, int) else x for name, x in shape.items()}
    if "batch" in shape:
        text = "{model} of {parameters} parameters, {pairs} pairs ({data}), {batch} a batch"
    elif "hidden" in shape:
        text = "{tokens} x {hidden} x {vocab}"
    elif "active" in shape:
        text = "{layout}, {active} of {rows} x {vocab}"
    elif "layout" in shape:
        text = "{layout}, {rows} rows, {tokens} tokens"
    else:
        text = "{rows} x {vocab}"
    if "gated" in shape:
        text += f", {shape['gated']:.0%} gated"
    return text.format(**size)


@dataclass(frozen=True)
class File:
    """The results of one kind of machine."""

    facts: Mapping[str, Any]
    lines: Sequence[Mapping[str, Any]]

    @cached_property
    def cases(self) -> list[Measured]:
        """In the order of the file; of a case that was measured again, the last time."""
        found: dict[str, Measured] = {}
        for line in self.lines:
            if "contenders" in line:
                names = ("op", "pass", "shape", "dtype", "axis", "x")
                found[json.dumps([line.get(name) for name in names])] = Measured(line)
        return list(found.values())

    @property
    def on_cpu(self) -> bool:
        return self.facts["device"] == "cpu"

    @property
    def name(self) -> str:
        return self.facts["isa"].upper() if self.on_cpu else self.facts["device"]

    @property
    def bandwidth(self) -> tuple[str, float | None]:
        """Of a read, or of a copy; bytes per second, None where that was not measured."""
        kind = "read" if self.on_cpu else "copy"
        return kind, self.facts.get(f"{kind}_bandwidth")

    @property
    def cache(self) -> int:
        return self.facts.get("last_level_cache" if self.on_cpu else "l2_cache", 0)


def file_name(facts: Mapping[str, Any]) -> str:
    """One name per kind of machine and instruction set: a new run replaces the old one."""
    if facts["device"] == "cpu":
        kind = f"cpu {facts['processor']} {facts['threads']} threads {facts['isa']}"
    else:
        kind = f"gpu {facts['device']}"
    plain = "".join(c if c.isalnum() else " " for c in kind.lower())
    return "-".join(plain.split()) + ".jsonl"


def write(path: Path, facts: Mapping[str, Any], lines: Iterable[Mapping[str, Any]]) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps(line) + "\n" for line in (facts, *lines)))
    part.replace(path)


def append(path: Path, line: Mapping[str, Any]) -> None:
    """On the disk when it returns: what comes next may take the machine down."""
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> File:
    facts, *lines = map(json.loads, path.read_text().splitlines())
    return File(facts, lines)


def files(device: str) -> list[File]:
    """Those of "cpu", "gpu" or "training"; AVX2 first, which the goals are set for."""
    found = map(read, sorted(RESULTS.glob(f"{device}-*.jsonl")))
    return sorted(found, key=lambda file: file.name != "AVX2")
