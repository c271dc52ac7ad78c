"""Pages and pictures of responses coloured by segment reward; one file each, no network.

Every page and picture carries its own style and follows the reader's light or dark setting. All
text that comes from data is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .markup import escape

# Colours by name, for a light and a dark background. series0 to series4 are Okabe and Ito's
# palette, which colour-blind readers can tell apart, darkened or lightened to stand out. good and
# bad are parts of a colour whose opacity says how large a reward is.
COLOURS = {
    "series0": ("#0072b2", "#5cb8f0"),
    "series1": ("#b85c00", "#f0a13c"),
    "series2": ("#00795c", "#3fd0a4"),
    "series3": ("#a3427d", "#e48fc0"),
    "series4": ("#4f4f4f", "#c0c0c0"),
    "ink": ("#1f2328", "#e6edf3"),
    "soft": ("#59636e", "#9da7b1"),
    "rule": ("#d8dee4", "#3a424b"),
    "paper": ("#ffffff", "#0f1419"),
    "panel": ("#f6f8fa", "#171d24"),
    "good": ("0, 114, 178", "70, 160, 225"),
    "bad": ("213, 94, 0", "230, 120, 40"),
}


def _variables(background: int) -> str:
    return " ".join(f"--{name}: {pair[background]};" for name, pair in COLOURS.items())


# The colours as variables of CSS, for anything that follows the reader's setting.
COLOUR_STYLE = (
    f":root {{ {_variables(0)} }}\n"
    f"@media (prefers-color-scheme: dark) {{ :root {{ {_variables(1)} }} }}\n"
)

_PICTURE_STYLE = """
text { fill: var(--ink); font: 13px ui-monospace, "SFMono-Regular", Menlo, Consolas, monospace; }
text.soft { fill: var(--soft); }
text.label { font: 12px system-ui, -apple-system, "Segoe UI", sans-serif; }
text.reward { font: 10.5px system-ui, -apple-system, "Segoe UI", sans-serif; }
"""

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
.charts svg, .wide svg { --paper: var(--panel); width: 100%; height: auto; border-radius: 8px;
  display: block; }
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


def document(title: str, body: Iterable[str]) -> str:
    """A whole html page; ``title`` is text, ``body`` is html."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{COLOUR_STYLE}{_PAGE_STYLE}</style></head><body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


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
    """Coloured responses as html blocks, for the body of a ``document``.

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
    return document(title, [f"<h1>{escape(title)}</h1>", response_blocks(rows)])


def responses_svg(rows: Sequence[Mapping[str, Any]], *, columns: int = 84) -> str:
    """A picture of coloured segments, rewards above them, as an SVG file; rows as in
    ``response_blocks``."""
    strongest, cell, line_height, left = _strongest(rows), 7.83, 42, 18
    parts, y = [], 14.0
    for row in rows:
        y += 14
        score = "" if row.get("score") is None else f"   score {row['score']:.2f}"
        parts.append(
            f'<text class="soft label" x="{left}" y="{y:.0f}">{escape(row.get("label") or "")}'
            f"{score}</text>"
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
                            f'<text class="soft reward" x="{x + 1:.1f}" y="{y - 19:.1f}">{mark}'
                            "</text>"
                        )
                    mark = ""
                kind = ' class="soft"' if reward is None else ""
                parts.append(
                    f'<text{kind} x="{x:.1f}" y="{y:.1f}" xml:space="preserve" '
                    f'textLength="{width:.1f}">{escape(piece)}</text>'
                )
                column += len(piece)
        y += 16
    width, height = left * 2 + cell * columns, y + 6
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
        f'width="{width:g}" height="{height:g}" role="img" '
        f'aria-label="responses coloured by segment reward"><style>{COLOUR_STYLE}{_PICTURE_STYLE}'
        f'</style><rect width="100%" height="100%" fill="var(--paper)"/>{"".join(parts)}</svg>\n'
    )


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
