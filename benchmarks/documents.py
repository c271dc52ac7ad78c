"""Tables and plots from the result files: ``python benchmarks/documents.py``.

Rewrites what stands between the markers in the documents, and the plots. Nothing there is written
by hand.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import unescape
from pathlib import Path

from goals import CPU_GOALS, GPU_GOALS, TRAINING_GOALS, UNMEASURED, Goal, table
from result_file import File, files
from tables import glance, machine, of_case

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "gpu.md")
IMAGES = ROOT / "docs" / "images"


def _everything(file: File) -> str:
    parts = [f"{case.title}:\n\n{of_case(file, case).markdown()}" for case in file.cases]
    return "\n\n".join([f"### {file.name}", f"{machine(file)}.", *parts])


def _reached(goals: Sequence[Goal], of: Sequence[File]) -> list[File]:
    """The files in which one of the goals is measured."""
    return [file for file in of if any(goal.measured(file) != UNMEASURED for goal in goals)]


def blocks() -> dict[str, str]:
    """What belongs between each pair of markers."""
    cpu, gpu, training = files("cpu"), files("gpu"), files("training")
    first = cpu[:1]
    reached = [goal for goal in GPU_GOALS if any(goal.measured(x) != UNMEASURED for x in gpu)]
    return {
        "goals cpu": table(CPU_GOALS, cpu).markdown(),
        "goals gpu": table(GPU_GOALS, gpu).markdown(),
        "goals training": table(TRAINING_GOALS, _reached(TRAINING_GOALS, training)).markdown(),
        "measured gpu": table(reached, gpu).markdown() if reached else "No GPU is measured yet.",
        "glance": "\n\n".join(f"{machine(x)}.\n\n{glance(x).markdown()}" for x in first),
        "plots": "\n".join(
            f"![{plot.title}](images/{plot.name})" for file in first for plot in plots(file)
        ),
        "results cpu": "\n\n".join(map(_everything, cpu)),
        "results training": "\n\n".join(map(_everything, training)) or "Not yet measured.",
        "results gpu": "\n\n".join(map(_everything, gpu)) or "Not yet measured.",
    }


def rewritten(document: str) -> str:
    """The document with everything between its markers made anew."""
    for name, block in blocks().items():
        mark = f"<!-- benchmarks: {name} -->\n"
        new = f"{mark}\n{block}\n\n<!-- end -->"
        document = re.sub(
            rf"{mark}.*?<!-- end -->", lambda _, new=new: new, document, flags=re.DOTALL
        )
    return document


# ---- plots -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plot:
    """Time against tokens or vocabulary, a line for each number of threads."""

    op: str
    passes: str
    axis: str
    lines: dict[str, list[tuple[float, float]]]  # by contender: thousands, milliseconds

    @property
    def name(self) -> str:
        words = re.findall(r"[a-z]+", f"{self.op} {self.passes} {self.axis}".lower())
        return f"benchmark-{'-'.join(words)}.svg"

    @property
    def title(self) -> str:
        return f"{self.op}, {self.passes}, against {self.axis}"

    @property
    def data(self) -> str:
        """All that the picture shows; it stands in its metadata."""
        return json.dumps({"title": self.title, "lines": self.lines})

    def svg(self) -> str:
        """The same text for the same data and version of matplotlib."""
        import matplotlib

        style = {
            "svg.fonttype": "none",
            "svg.hashsalt": self.name,
            "font.family": "sans-serif",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.color": "#d8dee4",
        }
        with matplotlib.rc_context(style):
            from matplotlib.figure import Figure

            figure = Figure(figsize=(5.6, 3.6), layout="constrained")
            axes = figure.subplots()
            for (label, points), marker in zip(self.lines.items(), "os^Dv", strict=False):
                axes.plot(*zip(*points, strict=True), marker=marker, label=label)
            axes.set_ylim(bottom=0)
            axes.set_title(f"{self.op}, {self.passes}", loc="left", fontsize="medium")
            axes.set_xlabel(f"{self.axis} (thousands)")
            axes.set_ylabel("milliseconds")
            axes.legend(frameon=False)
            out = io.StringIO()
            figure.savefig(out, format="svg", metadata={"Date": None, "Description": self.data})
        return re.sub(r"[ \t]+$", "", out.getvalue(), flags=re.MULTILINE)


def plotted(svg: str) -> str:
    """The data of a picture."""
    found = re.search(r"<dc:description>(.*?)</dc:description>", svg, re.DOTALL)
    return unescape(found[1]) if found else ""


def plots(file: File) -> Iterator[Plot]:
    found: dict[tuple[str, str, str], Plot] = {}
    for case in file.cases:
        axis = case.line.get("axis")
        if axis is None:
            continue
        key = (case.line["op"], case.line["pass"], axis)
        plot = found.setdefault(key, Plot(*key, {}))
        for result in case.contenders:
            points = plot.lines.setdefault(result["name"], [])
            points.append((case.line["x"] / 1000, result["median"] * 1000))
    for plot in found.values():
        for points in plot.lines.values():
            points.sort()
        yield plot


def rewrite() -> None:
    for path in DOCUMENTS:
        path.write_text(rewritten(path.read_text()))


def main() -> None:
    rewrite()
    for file in files("cpu")[:1]:
        for plot in plots(file):
            (IMAGES / plot.name).write_text(plot.svg())


if __name__ == "__main__":
    main()
