"""Reports for people: charts as inline SVG, responses coloured by reward, one file, no network.

Every page and picture carries its own style, follows the reader's light or dark setting and asks
nothing of the outside. All text that comes from data is escaped.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from segkernels import normalizer_from_dict

from .markup import escape

Point = tuple[float, float]

# Okabe and Ito's palette, which colour-blind readers can tell apart, darkened or lightened to stand
# on either background; a series also has a dash pattern and a marker of its own.
_LIGHT = ("#0072b2", "#b85c00", "#00795c", "#a3427d", "#4f4f4f")
_DARK = ("#5cb8f0", "#f0a13c", "#3fd0a4", "#e48fc0", "#c0c0c0")
_DASHES = ("", "7 4", "2 3", "9 3 2 3", "4 4")
_MARKERS = 4


def _variables(colours: Sequence[str], **others: str) -> str:
    named = {f"s{i}": colour for i, colour in enumerate(colours)} | others
    return " ".join(f"--{name}: {value};" for name, value in named.items())


_LIGHT_VARIABLES = _variables(
    _LIGHT, ink="#1f2328", soft="#59636e", rule="#d8dee4", paper="#ffffff", panel="#f6f8fa",
    good="0, 114, 178", bad="213, 94, 0",
)  # fmt: skip
_DARK_VARIABLES = _variables(
    _DARK, ink="#e6edf3", soft="#9da7b1", rule="#3a424b", paper="#0f1419", panel="#171d24",
    good="70, 160, 225", bad="230, 120, 40",
)  # fmt: skip

_SVG_STYLE = (
    f":root {{ {_LIGHT_VARIABLES} }}\n"
    f"@media (prefers-color-scheme: dark) {{ :root {{ {_DARK_VARIABLES} }} }}\n"
    """svg text { fill: var(--ink); font: 12px system-ui, -apple-system, "Segoe UI", sans-serif; }
svg .title { font-size: 14px; font-weight: 600; }
svg .soft { fill: var(--soft); }
svg .mono { font: 13px ui-monospace, "SFMono-Regular", Menlo, Consolas, monospace; }
svg .halo { stroke: var(--panel); stroke-width: 4; paint-order: stroke; }
svg .grid { stroke: var(--rule); stroke-width: 1; }
svg .axis { stroke: var(--soft); stroke-width: 1; }
svg .line { fill: none; stroke-width: 2; stroke-linejoin: round; }
svg .thin { fill: none; stroke-width: 1; opacity: 0.35; }
svg .band { opacity: 0.16; stroke: none; }
"""
    + "".join(
        f"svg .s{i} {{ stroke: var(--s{i}); }} svg .f{i} {{ fill: var(--s{i}); }}\n"
        for i in range(len(_LIGHT))
    )
)

_PAGE_STYLE = """
:root { color-scheme: light dark; }
body { margin: 0 auto; max-width: 68rem; padding: 1.5rem; color: var(--ink);
  background: var(--paper); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 0.5rem; }
h2 { font-size: 1.15rem; margin: 2rem 0 0.5rem; }
p { max-width: 46rem; }
.soft { color: var(--soft); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr));
  gap: 1rem; }
.charts svg, .wide svg { width: 100%; height: auto; background: var(--panel);
  border-radius: 8px; display: block; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.45rem; text-align: right; border-bottom: 1px solid var(--rule); }
td { white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
.response { background: var(--panel); border-radius: 8px; padding: 0.7rem 0.9rem;
  margin: 0.7rem 0; overflow-wrap: anywhere; }
.response .head { display: flex; gap: 1rem; color: var(--soft); font-size: 13px; }
.response .prompt { color: var(--soft); }
.response .text { white-space: pre-wrap; line-height: 1.9; margin-top: 0.25rem; }
.seg { position: relative; padding: 0.12em 0.15em; border-radius: 3px;
  -webkit-box-decoration-break: clone; box-decoration-break: clone; }
.seg + .seg { margin-left: 1px; }
.seg:focus { outline: 2px solid var(--ink); }
.seg[data-reward]:hover::after, .seg[data-reward]:focus::after { content: attr(data-reward);
  position: absolute; left: 0; bottom: 105%; padding: 0 0.45em; border-radius: 4px; z-index: 1;
  background: var(--ink); color: var(--paper); font-size: 12px; line-height: 1.6;
  white-space: nowrap; }
.scale { display: inline-block; width: 12rem; height: 0.8rem; border-radius: 3px;
  vertical-align: middle; margin: 0 0.5rem; background: linear-gradient(90deg,
  rgba(var(--bad), 0.65), rgba(var(--bad), 0), rgba(var(--good), 0), rgba(var(--good), 0.65)); }
"""


def number(value: float | None, digits: int = 3) -> str:
    """A number for a table: so many significant digits, never in exponents; a dash for none."""
    if value is None or not math.isfinite(value):
        return "-"
    if value == 0:
        return "0"
    decimals = max(digits - 1 - math.floor(math.log10(abs(value))), 0)
    return f"{value:.{min(decimals, 4)}f}"


# ---- charts ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """One series of a chart; its colour, dashes and marker come from its place in the list."""

    name: str
    points: Sequence[Point]
    band: Sequence[tuple[float, float, float]] = ()  # x, low, high
    thin: Sequence[Sequence[Point]] = ()  # the single runs behind a mean


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) from ``low`` or below to ``high`` or
    above, about ``count`` of them."""
    if not high > low:
        low, high = low - 0.5, high + 0.5
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(m for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(k * step, 12) for k in range(first, last + 1)]


@dataclass(frozen=True)
class _Axes:
    """Data coordinates on a rectangle of the picture."""

    left: float
    top: float
    width: float
    height: float
    x_ticks: list[float]
    y_ticks: list[float]

    def x(self, value: float) -> float:
        low, high = self.x_ticks[0], self.x_ticks[-1]
        return self.left + self.width * (value - low) / (high - low)

    def y(self, value: float) -> float:
        low, high = self.y_ticks[0], self.y_ticks[-1]
        return self.top + self.height * (1 - (value - low) / (high - low))

    def path(self, points: Iterable[Point]) -> str:
        return "M" + " L".join(f"{self.x(x):.1f} {self.y(y):.1f}" for x, y in points)

    def frame(self, title: str, x_label: str, y_label: str) -> list[str]:
        bottom, right = self.top + self.height, self.left + self.width
        parts = [f'<text class="title" x="{self.left - 50:.0f}" y="22">{escape(title)}</text>']
        for tick in self.y_ticks:
            y = self.y(tick)
            parts.append(
                f'<path class="grid" d="M{self.left} {y:.1f} H{right}"/>'
                f'<text class="soft" x="{self.left - 7}" y="{y + 4:.1f}" text-anchor="end">'
                f"{tick:g}</text>"
            )
        for tick in self.x_ticks:
            x = self.x(tick)
            parts.append(
                f'<path class="axis" d="M{x:.1f} {bottom} v4"/>'
                f'<text class="soft" x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">'
                f"{tick:g}</text>"
            )
        middle = self.top + self.height / 2
        parts.append(
            f'<path class="axis" d="M{self.left} {bottom} H{right}"/>'
            f'<text x="{self.left + self.width / 2:.0f}" y="{bottom + 37}" text-anchor="middle">'
            f"{escape(x_label)}</text>"
            f'<text text-anchor="middle" transform="translate({self.left - 46:.0f} {middle:.0f}) '
            f'rotate(-90)">{escape(y_label)}</text>'
        )
        return parts


def _marker(kind: int, x: float, y: float, size: float = 3.6) -> str:
    at = {"x": f"{x:.1f}", "y": f"{y:.1f}"}
    if kind % _MARKERS == 0:
        return f'<circle class="f{kind}" cx="{at["x"]}" cy="{at["y"]}" r="{size}">'
    shapes: dict[int, list[tuple[float, float]]] = {
        1: [(-1, -1), (1, -1), (1, 1), (-1, 1)],
        2: [(0, -1.25), (1.2, 0.9), (-1.2, 0.9)],
        3: [(0, -1.35), (1.35, 0), (0, 1.35), (-1.35, 0)],
    }
    corners = " ".join(
        f"{x + dx * size * 0.9:.1f},{y + dy * size * 0.9:.1f}" for dx, dy in shapes[kind % _MARKERS]
    )
    return f'<polygon class="f{kind}" points="{corners}">'


def _closed(marker: str, tip: str) -> str:
    tag = marker[1 : marker.index(" ")]
    return f"{marker}<title>{escape(tip)}</title></{tag}>"


def _svg(width: float, height: float, label: str, parts: Iterable[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
        f'width="{width:g}" height="{height:g}" role="img" aria-label="{escape(label)}">'
        f"{''.join(parts)}</svg>"
    )


def standalone(svg: str) -> str:
    """An SVG of this module as a file of its own, with background and style."""
    head, _, body = svg.partition(">")
    paper = '<rect width="100%" height="100%" fill="var(--paper)"/>'
    return f"{head}><style>{_SVG_STYLE}</style>{paper}{body}\n"


def _legend(names: Sequence[str], left: float, top: float, room: float) -> tuple[list[str], float]:
    """Marks and names in lines no wider than ``room``; also the height they take."""
    parts, x, y = [], left, top
    for i, name in enumerate(names):
        width = 42 + 6.9 * len(name)
        if x > left and x + width > left + room:
            x, y = left, y + 18
        parts.append(
            f'<path class="line s{i}" stroke-dasharray="{_DASHES[i]}" d="M{x:.0f} {y:.0f} h24"/>'
            f"{_closed(_marker(i, x + 12, y), name)}"
            f'<text x="{x + 30:.0f}" y="{y + 4:.0f}">{escape(name)}</text>'
        )
        x += width
    return parts, y - top + 18


def line_chart_svg(
    lines: Sequence[Line],
    *,
    title: str,
    x_label: str,
    y_label: str,
    width: int = 520,
    height: int = 340,
    level: tuple[float, str] | None = None,
) -> str:
    """A chart of up to five series, with ticks, a legend, and numbers on hover.

    ``level`` is a height drawn as a dotted line, with its name. Points that are not finite are left
    out. At least one finite point is needed (ValueError).
    """
    if len(lines) > len(_LIGHT):
        raise ValueError(
            f"lines: expected at most {len(_LIGHT)}, got {len(lines)}; split the chart"
        )
    shown = [
        [(x, y) for x, y in line.points if math.isfinite(x) and math.isfinite(y)] for line in lines
    ]
    xs = [x for points in shown for x, _ in points]
    ys = [y for points in shown for _, y in points]
    if not xs:
        raise ValueError("lines: expected at least one finite point, got none")
    for line in lines:
        ys += [y for _, low, high in line.band for y in (low, high)]
        xs += [x for run in line.thin for x, _ in run]
        ys += [y for run in line.thin for _, y in run]
    if level is not None:
        ys.append(level[0])
    legend, taken = _legend([line.name for line in lines], 14, 44, width - 28)
    top = 44 + taken
    axes = _Axes(
        64, top, width - 84, height - top - 48, ticks(min(xs), max(xs)), ticks(min(ys), max(ys))
    )
    parts = [*axes.frame(title, x_label, y_label), *legend]
    if level is not None:
        y = axes.y(level[0])
        parts.append(
            f'<path class="axis" stroke-dasharray="2 3" d="M{axes.left} {y:.1f} '
            f'h{axes.width}"/><text class="soft halo" x="{axes.left + 4}" y="{y - 5:.1f}">'
            f"{escape(level[1])}</text>"
        )
    for i, line in enumerate(lines):
        if line.band:
            edge = [(x, low) for x, low, _ in line.band]
            edge += [(x, high) for x, _, high in reversed(line.band)]
            parts.append(f'<path class="band f{i}" d="{axes.path(edge)} Z"/>')
        parts += [f'<path class="thin s{i}" d="{axes.path(run)}"/>' for run in line.thin if run]
    for i, (line, points) in enumerate(zip(lines, shown, strict=True)):
        if not points:
            continue
        parts.append(
            f'<path class="line s{i}" stroke-dasharray="{_DASHES[i]}" d="{axes.path(points)}"/>'
        )
        for x, y in points:
            tip = f"{line.name}: {y_label} {number(y)} at {x_label} {number(x)}"
            parts.append(_closed(_marker(i, axes.x(x), axes.y(y)), tip))
    return _svg(width, height, title, parts)


def _middle(values: Sequence[float], counts: Sequence[float], share: float = 0.99) -> Point:
    """The range that holds the middle ``share`` of the values, each counted so many times."""
    rest = (1 - share) / 2 * sum(counts)
    ordered = sorted(zip(values, counts, strict=True))
    ends = []
    for way in (ordered, ordered[::-1]):
        passed = itertools.accumulate(count for _, count in way)
        ends.append(next(v for (v, _), n in zip(way, passed, strict=True) if n > rest))
    return ends[0], ends[1]


def normalizer_svg(fit: Mapping[str, Any]) -> str:
    """Mean and std of segment rewards over position: measured, as a log line, and as a table.

    ``fit`` has the fields of ``segkernels.LocationFit`` in plain lists: ``positions``,
    ``means``, ``stds`` and ``counts`` of equal length, ``line`` and ``table`` by ``to_dict()``, and
    ``r2_mean`` and ``r2_std``. The frame holds both curves and the middle 99 % of the segments'
    positions by value, so that a few rare positions do not flatten it.
    """
    forms = [normalizer_from_dict(fit[name]) for name in ("line", "table")]
    p = torch.linspace(max(min(fit["positions"]), 1e-3), 1, 200, dtype=torch.float64)
    biggest = max(fit["counts"])
    width, height, panel = 880, 340, 440
    parts = []
    for k, (name, measured, r2) in enumerate(
        (("mean", fit["means"], fit["r2_mean"]), ("std", fit["stds"], fit["r2_std"]))
    ):
        curves = [getattr(form, name)(p).tolist() for form in forms]
        core = _middle(measured, fit["counts"])
        low, high = min(core[0], *map(min, curves)), max(core[1], *map(max, curves))
        axes = _Axes(
            panel * k + 64, 62, panel - 88, height - 62 - 48, ticks(0, 1), ticks(low, high)
        )
        title = f"{name} of segment rewards: R² of the log line {number(r2, 2)}"
        parts += axes.frame(title, "relative position p of the segment", f"{name}(p)")
        for x, y, n in zip(fit["positions"], measured, fit["counts"], strict=True):
            if not axes.y_ticks[0] <= y <= axes.y_ticks[-1]:
                continue
            size = 1.2 + 3.2 * math.sqrt(n / biggest)
            tip = f"p {x:.3f}: {name} {number(y)} over {n:.0f} segments"
            parts.append(
                f'<circle class="f4" fill-opacity="0.45" cx="{axes.x(x):.1f}" '
                f'cy="{axes.y(y):.1f}" r="{size:.1f}"><title>{escape(tip)}</title></circle>'
            )
        for i, curve in enumerate(curves):
            path = axes.path(zip(p.tolist(), curve, strict=True))
            parts.append(f'<path class="line s{i}" stroke-dasharray="{_DASHES[i]}" d="{path}"/>')
        x = axes.left
        parts.append(
            f'<circle class="f4" fill-opacity="0.45" cx="{x + 6}" cy="44" r="4"/>'
            f'<text x="{x + 16}" y="48">measured, 99 % of segments</text>'
        )
        for i, form in enumerate(("line", "table")):
            at = x + 204 + 76 * i
            parts.append(
                f'<path class="line s{i}" stroke-dasharray="{_DASHES[i]}" d="M{at} 44 h24"/>'
                f'<text x="{at + 30}" y="48">{form}</text>'
            )
    return _svg(width, height, "fit of the normaliser", parts)


# ---- responses ---------------------------------------------------------------------------------

Segment = tuple[str, float | None]  # text; its reward, None for text that lies in no segment


def _strongest(rows: Iterable[Mapping[str, Any]]) -> float:
    """The reward that gets the full colour."""
    sizes = [
        abs(r) for row in rows for _, r in row["segments"] if r is not None and math.isfinite(r)
    ]
    return max(sizes, default=1.0) or 1.0


def _shade(reward: float, strongest: float) -> tuple[str, float]:
    return ("good" if reward >= 0 else "bad"), 0.65 * min(abs(reward) / strongest, 1.0)


def _segment_html(segment: Segment, strongest: float) -> str:
    text, reward = segment
    if reward is None or not math.isfinite(reward):
        return f'<span class="seg">{escape(text)}</span>'
    colour, alpha = _shade(reward, strongest)
    return (
        f'<span class="seg" tabindex="0" data-reward="{reward:+.3f}" '
        f'style="background: rgba(var(--{colour}), {alpha:.3f})">{escape(text)}</span>'
    )


def response_blocks(rows: Sequence[Mapping[str, Any]]) -> str:
    """Coloured responses as html blocks for a page of this module.

    A row holds ``prompt`` (text), ``segments`` (pairs of text and reward; reward None for text in
    no segment), ``score`` (a number or None) and ``label`` (text, may be empty). One colour scale
    serves all rows.
    """
    strongest = _strongest(rows)
    blocks = [
        f'<p class="soft">segment reward {-strongest:.2f}<span class="scale"></span>'
        f"{strongest:+.2f} (point at a segment for its number)</p>"
    ]
    for row in rows:
        head = f"<span>{escape(str(row.get('label') or ''))}</span>"
        if row.get("score") is not None:
            head += f"<span>score {row['score']:.3f}</span>"
        body = "".join(_segment_html(segment, strongest) for segment in row["segments"])
        blocks.append(
            f'<div class="response"><div class="head">{head}</div><div class="text">'
            f'<span class="prompt">{escape(row["prompt"])}</span>{body}</div></div>'
        )
    return "\n".join(blocks)


def responses_html(rows: Sequence[Mapping[str, Any]], title: str) -> str:
    """A page of responses coloured by segment reward; rows as in ``response_blocks``."""
    return _page(title, [f"<h1>{escape(title)}</h1>", response_blocks(rows)])


def responses_svg(rows: Sequence[Mapping[str, Any]], *, columns: int = 84) -> str:
    """A picture of coloured segments, rewards above them; rows as in ``response_blocks``."""
    strongest, cell, line_height, left = _strongest(rows), 7.83, 42, 18
    parts, y = [], 14.0
    for row in rows:
        y += 14
        score = "" if row.get("score") is None else f"   score {row['score']:.2f}"
        parts.append(
            f'<text class="soft" x="{left}" y="{y:.0f}">{escape(row.get("label") or "")}{score}'
            "</text>"
        )
        y += line_height - 6
        column = 0
        for text, reward in [(row["prompt"], None), *row["segments"]]:
            # A number needs the room of four characters, or it would lie on its neighbour.
            mark = "" if reward is None or len(text) < 4 else f"{reward:+.2f}"
            for piece in _fold(text, column, columns):
                if piece is None:
                    column, y = 0, y + line_height
                    continue
                x, width = left + cell * column, cell * len(piece)
                if reward is not None:
                    colour, alpha = _shade(reward, strongest)
                    parts.append(
                        f'<rect x="{x:.1f}" y="{y - 15:.1f}" width="{width - 1.5:.1f}" height="21" '
                        f'rx="3" style="fill: rgba(var(--{colour}), {alpha:.3f})"/>'
                    )
                    if mark:
                        parts.append(
                            f'<text class="soft" style="font-size: 10.5px" x="{x + 1:.1f}" '
                            f'y="{y - 19:.1f}">{mark}</text>'
                        )
                    mark = ""
                kind = "mono soft" if reward is None else "mono"
                parts.append(
                    f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" xml:space="preserve" '
                    f'textLength="{width:.1f}">{escape(piece)}</text>'
                )
                column += len(piece)
        y += 16
    return _svg(left * 2 + cell * columns, y + 6, "responses coloured by segment reward", parts)


def _fold(text: str, column: int, columns: int) -> Iterable[str | None]:
    """Pieces of ``text`` that fit lines of ``columns``, None where a new line starts."""
    piece = ""
    words = text.replace("\n", " ").split(" ")
    for k, word in enumerate(words):
        word = word + (" " if k < len(words) - 1 else "")
        if column + len(piece) + len(word.rstrip()) > columns and column + len(piece) > 0:
            if piece:
                yield piece
            yield None
            piece, column = "", 0
        piece += word
    if piece:
        yield piece


# ---- pages -------------------------------------------------------------------------------------


def _page(title: str, body: Iterable[str]) -> str:
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_SVG_STYLE}{_PAGE_STYLE}</style></head><body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


@dataclass(frozen=True)
class Table:
    """A table of text cells, rendered as html, markdown or plain text."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]] = field(default_factory=list)

    def html(self) -> str:
        head = "".join(f"<th>{escape(name)}</th>" for name in self.columns)
        body = "\n".join(
            "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
            for row in self.rows
        )
        return (
            f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n'
            "</tbody></table></div>"
        )

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


def demo_notes(results: Mapping[str, Any]) -> list[str]:
    """What a reader of the demonstration's table has to know, one sentence group per line."""
    settings, levels = results["settings"], results["levels"]
    seeds, first = settings["seeds"], settings["seed"]
    last = first + seeds - 1
    notes = [
        "Gold is the known reward that labelled the pairs, on held-out prompts; no training reads "
        f"it. Here: {results['gold']['about']}; a phrase counts once a response.",
        "Segments: how many the frozen language model's entropy cuts a response into, measured the "
        "same way for every variant.",
        f"Gold {number(levels['gold'])} and KL {number(levels['kl'])} nats are the highest that "
        "every run reached; values there are read between evaluations on a straight line.",
        f"All variants ran with the same settings (beta {settings['kl_coef']:g}, lr "
        f"{settings['learning_rate']:g}, reduction {settings['reward_reduction']}); nothing was "
        f"tuned for one of them. Texts, pairs and reward models have seed {first}, PPO "
        + (
            f"seeds {first} to {last}; ± is the standard deviation."
            if seeds > 1
            else f"seed {first}. One seed proves little: --seeds 5 gives means and deviations."
        ),
    ]
    if settings["reward_reduction"] == "mean":
        notes.append(
            "The other side of it: --reward_reduction sum --updates 60 pays K times more against "
            "the same beta, and shows a policy that games its reward model."
        )
    return notes


def _mean_line(name: str, runs: Sequence[Mapping[str, Any]], x: str, y: str) -> Line:
    """Mean over seeds at each evaluation; a band of one deviation, or the runs where x varies."""
    points, band = [], []
    for at in zip(*(run["curve"] for run in runs), strict=True):
        xs, ys = [p[x] for p in at], [p[y] for p in at]
        mean = statistics.fmean(ys)
        points.append((statistics.fmean(xs), mean))
        if len(ys) > 1:
            spread = statistics.stdev(ys)
            band.append((xs[0], mean - spread, mean + spread))
    if x == "update":
        return Line(name, points, band=band)
    single = [[(p[x], p[y]) for p in run["curve"]] for run in runs]
    return Line(name, points, thin=single if len(runs) > 1 else ())


def demo_charts(results: Mapping[str, Any]) -> dict[str, str]:
    """The demonstration's charts as inline SVG, by name."""
    runs, levels = results["runs"], results["levels"]

    def chart(x: str, y: str, title: str, x_label: str, y_label: str, **options: Any) -> str:
        lines = [_mean_line(name, variant, x, y) for name, variant in runs.items()]
        return line_chart_svg(lines, title=title, x_label=x_label, y_label=y_label, **options)

    level = (levels["gold"], "reached by all")
    return {
        "gold_updates": chart(
            "update", "gold", "Gold reward against updates", "PPO update", "gold", level=level
        ),
        "gold_kl": chart("kl", "gold", "Gold reward against KL", "KL to the start (nats)", "gold"),
        "segments": chart(
            "update", "segments", "Segments per response", "PPO update", "segments per response"
        ),
        "kl": chart("update", "kl", "KL against updates", "PPO update", "KL (nats)"),
        "bigrams": chart(
            "update", "distinct_bigrams", "Diversity", "PPO update", "distinct bigrams (share)"
        ),
        "length": chart("update", "length", "Response length", "PPO update", "tokens per response"),
    }


def demo_html(results: Mapping[str, Any]) -> str:
    """The demonstration's page: table, charts, normalisers, coloured responses, settings."""
    charts = demo_charts(results)
    body = [
        "<h1>Segment-level RLHF on a small language model</h1>",
        "<p>Pairs of responses, labelled by a known rule, train a bandit, a token and a segment "
        "reward model; PPO then follows each. The last variant pays the segment model's mean at "
        "the last token: the same reward model without its placement of credit.</p>",
        Table(**results["table"]).html(),
        *(f'<p class="soft">{escape(note)}</p>' for note in demo_notes(results)),
        "<h2>Learning curves</h2>",
        f'<div class="charts">{"".join(charts.values())}</div>',
    ]
    for granularity, model in results["reward_models"].items():
        if granularity == "bandit":
            continue
        body += [
            f"<h2>Normaliser of the {granularity} model: {escape(model['fit']['kind'])}</h2>",
            f'<div class="wide">{normalizer_svg(model["fit"])}</div>',
        ]
    body += [
        "<h2>Held-out responses before and after PPO with segment rewards</h2>",
        response_blocks(results["examples"]),
        "<h2>Settings</h2>",
    ]
    facts = {
        **results["settings"],
        **results["versions"],
        **{f"seconds: {name}": f"{value:.0f}" for name, value in results["seconds"].items()},
    }
    body.append(Table(["setting", "value"], [[k, str(v)] for k, v in facts.items()]).html())
    return _page("segrlhf demo", body)
