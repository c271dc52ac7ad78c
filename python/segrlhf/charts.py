"""Charts as SVG by matplotlib, readable on light and dark backgrounds.

A chart is a file of its own that also goes into a page as it stands. The same data gives the same
bytes. Text that comes from data is written as text: never read as mathematics or as markup.
matplotlib is imported by the functions that draw.
"""

from __future__ import annotations

import io
import itertools
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from segkernels import normalizer_from_dict

from .markup import representable
from .page import COLOUR_STYLE, COLOURS
from .tables import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Point = tuple[float, float]

_SERIES = [light for name, (light, _) in COLOURS.items() if name.startswith("series")]
_DASHES = ("-", (0, (5, 3)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)), (0, (3, 3)))
_MARKERS = ("o", "s", "^", "D", "v")
_INK, _SOFT, _RULE = (COLOURS[name][0] for name in ("ink", "soft", "rule"))
_SETTINGS = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "segrlhf",  # else the ids of shapes are random
    "text.parse_math": False,
    "font.size": 11,
    "font.sans-serif": ["DejaVu Sans"],
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _SOFT,
    "ytick.color": _SOFT,
    "axes.edgecolor": _SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": _RULE,
    "ytick.left": False,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.unicode_minus": False,
    "figure.constrained_layout.w_pad": 0.12,
    "figure.constrained_layout.h_pad": 0.1,
    "figure.facecolor": COLOURS["paper"][0],
    "axes.facecolor": "none",
    "legend.frameon": False,
    "lines.linewidth": 2,
    "lines.markersize": 6,
}


@dataclass(frozen=True)
class Line:
    """One series of a chart; its colour, dashes and marker come from its place in the list."""

    name: str
    points: Sequence[Point]
    band: Sequence[tuple[float, float, float]] = ()  # x, low, high
    thin: Sequence[Sequence[Point]] = ()  # the single runs behind a mean


def line_chart(
    lines: Sequence[Line],
    *,
    title: str,
    x_label: str,
    y_label: str,
    level: tuple[float, str] | None = None,
) -> str:
    """A chart of up to five series, with a legend, and numbers on hover, as an SVG file.

    ``level`` is a height drawn as a dotted line, with its name. Points that are not finite are left
    out. At least one finite point is needed (ValueError).
    """
    if len(lines) > len(_SERIES):
        raise ValueError(
            f"lines: expected at most {len(_SERIES)}, got {len(lines)}; split the chart"
        )
    shown = [[p for p in line.points if all(map(math.isfinite, p))] for line in lines]
    if not any(shown):
        raise ValueError("lines: expected at least one finite point, got none")
    tips = {}
    with _figure(520, 340) as figure:
        axes = figure.subplots()
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        if level is not None:
            axes.axhline(level[0], color=_SOFT, linewidth=1, linestyle=":")
            axes.annotate(
                level[1], (0, level[0]), (4, 3), xycoords=("axes fraction", "data"),
                textcoords="offset points", color=_SOFT,
            )  # fmt: skip
        handles = []
        for i, (line, points) in enumerate(zip(lines, shown, strict=True)):
            colour = _SERIES[i]
            if line.band:
                x, low, high = zip(*line.band, strict=True)
                axes.fill_between(x, low, high, color=colour, alpha=0.16, linewidth=0)
            for run in line.thin:
                axes.plot(*zip(*run, strict=True), color=colour, alpha=0.35, linewidth=1)
            handles += axes.plot(
                [x for x, _ in points],
                [y for _, y in points],
                color=colour,
                linestyle=_DASHES[i],
                marker=_MARKERS[i],
                label=line.name,
                gid=f"points{i}",
            )
            tips[f"points{i}"] = [
                f"{line.name}: {y_label} {number(y)} at {x_label} {number(x)}" for x, y in points
            ]
        # Asked for by handle, because matplotlib leaves out names that start with an underscore.
        figure.legend(
            handles,
            [line.name for line in lines],
            title=title,
            title_fontproperties={"weight": "bold", "size": 13},
            alignment="left",
            loc="outside upper left",
            ncols=2,
        )
        whole = all(float(x).is_integer() for points in shown for x, _ in points)
        axes.locator_params(axis="x", integer=whole, steps=[1, 2, 5, 10])
        return _svg(figure, title, tips)


def _middle(values: Sequence[float], counts: Sequence[float], share: float = 0.99) -> Point:
    """The range that holds the middle ``share`` of the values, each counted so many times."""
    rest = (1 - share) / 2 * sum(counts)
    ordered = sorted(zip(values, counts, strict=True))
    ends = []
    for way in (ordered, ordered[::-1]):
        passed = itertools.accumulate(count for _, count in way)
        ends.append(next(v for (v, _), n in zip(way, passed, strict=True) if n > rest))
    return ends[0], ends[1]


def normalizer_chart(fit: Mapping[str, Any]) -> str:
    """Mean and std of segment rewards over position: measured, as a log line, and as a table.

    ``fit`` has the fields of ``segkernels.normalizer.LocationFit`` in plain lists: ``positions``,
    ``means``, ``stds`` and ``counts`` of equal length, ``line`` and ``table`` by ``to_dict()``, and
    ``r2_mean`` and ``r2_std``. The frame holds both curves and the middle 99 % of the segments'
    positions by value, so that a few rare positions do not flatten it.
    """
    forms = {name: normalizer_from_dict(fit[name]) for name in ("line", "table")}
    p = torch.linspace(max(min(fit["positions"]), 1e-3), 1, 200, dtype=torch.float64)
    tips = {}
    with _figure(880, 340) as figure:
        panels: Sequence[Axes] = figure.subplots(1, 2)
        for axes, name in zip(panels, ("mean", "std"), strict=True):
            curves = {form: getattr(f, name)(p).tolist() for form, f in forms.items()}
            core = _middle(fit[f"{name}s"], fit["counts"])
            low = min(core[0], *map(min, curves.values()))
            high = max(core[1], *map(max, curves.values()))
            room = 0.05 * (high - low) or 0.5
            axes.set_ylim(low - room, high + room)
            axes.set_xlim(0, 1.02)
            # Marks of one size are one artist: as SVG each is then a reference, not an outline.
            sizes: dict[int, list[tuple[float, float, float]]] = {}
            for point in zip(fit["positions"], fit[f"{name}s"], fit["counts"], strict=True):
                if low <= point[1] <= high:
                    size = round(2 + 7 * math.sqrt(point[2] / max(fit["counts"])))
                    sizes.setdefault(size, []).append(point)
            for size, points in sizes.items():
                axes.plot(
                    [x for x, _, _ in points],
                    [y for _, y, _ in points],
                    "o",
                    color=_SERIES[4],
                    alpha=0.45,
                    markersize=size,
                    markeredgewidth=0,
                    gid=f"{name}{size}",
                )
                tips[f"{name}{size}"] = [
                    f"p {x:.3f}: {name} {number(y)} over {n:.0f} segments" for x, y, n in points
                ]
            for i, curve in enumerate(curves.values()):
                axes.plot(p.tolist(), curve, color=_SERIES[i], linestyle=_DASHES[i])
            axes.set_xlabel("relative position p of the segment")
            axes.set_ylabel(f"{name}(p)")
            axes.set_title(
                f"{name} of segment rewards: R² of the log line {number(fit[f'r2_{name}'], 2)}"
            )
        handles = [panels[0].lines[k] for k in (0, -2, -1)]
        names = ["measured, 99 % of segments", *forms]
        figure.legend(handles, names, loc="outside lower left", ncols=3)
        return _svg(figure, "fit of the normaliser", tips)


# ---- matplotlib's SVG, made to follow the reader's colours ---------------------------------------

_SVG_SPACE, _LINK_SPACE = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_VARIABLES = {light: f"var(--{name})" for name, (light, _) in COLOURS.items()}


@contextmanager
def _figure(width: int, height: int) -> Iterator[Figure]:
    """A figure of so many pixels, drawn by our settings whatever the user's matplotlibrc says."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        yield Figure((width / 72, height / 72), layout="constrained")  # an SVG has 72 dots an inch


def _svg(figure: Figure, label: str, tips: Mapping[str, Sequence[str]]) -> str:
    """The figure as SVG, its colours as variables; ``tips`` are the hover texts of the marks of
    each artist, by gid."""
    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", metadata=nothing)
    root = ET.fromstring(representable(file.getvalue()))
    for name in ("width", "height"):
        root.set(name, root.get(name, "").removesuffix("pt"))
    root.set("role", "img")
    root.set("aria-label", representable(label))
    for element in root.iter():
        for name in ("d", "x", "y"):
            if path := element.get(name):
                # A hundredth of a pixel: shorter, and the same on every processor.
                element.set(name, re.sub(r"-?\d+\.\d+", lambda m: f"{float(m[0]):.2f}", path))
        if style := element.get("style"):
            style = re.sub("#[0-9a-f]{6}", lambda m: _VARIABLES.get(m[0], m[0]), style)
            element.set("style", style)
        if element.tag == f"{{{_SVG_SPACE}}}style":
            element.text = f"{COLOUR_STYLE}{element.text}"
        # Several charts go into one page, where an id must not occur twice.
        gid = element.attrib.pop("id", "") if element.tag == f"{{{_SVG_SPACE}}}g" else ""
        if gid in tips:
            for mark, tip in zip(element.iter(f"{{{_SVG_SPACE}}}use"), tips[gid], strict=True):
                ET.SubElement(mark, f"{{{_SVG_SPACE}}}title").text = representable(tip)
    ET.register_namespace("", _SVG_SPACE)
    ET.register_namespace("xlink", _LINK_SPACE)
    return ET.tostring(root, encoding="unicode") + "\n"
