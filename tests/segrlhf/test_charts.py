"""Charts: whole, deterministic, escaped, and in the reader's colours."""

import re
import subprocess
import sys
import xml.etree.ElementTree as ET

import matplotlib
import pytest

from segkernels.normalizer import LocationNormalizer, TableNormalizer
from segrlhf import charts, page

NASTY = "<script>alert('x')</script> & \"quoted\" $x_1$"
SVG = "{http://www.w3.org/2000/svg}"
LINK = "{http://www.w3.org/1999/xlink}href"
FIT = {
    "kind": "line",
    "positions": [0.25, 0.5, 1.0],
    "means": [0.1, 0.4, 0.9],
    "stds": [1.0, 1.2, 1.1],
    "counts": [3.0, 5.0, 9.0],
    "line": LocationNormalizer(0.5, 0.8, 0.1, 1.1).to_dict(),
    "table": TableNormalizer([0.25, 1.0], [0.1, 0.9], [1.0, 1.1]).to_dict(),
    "r2_mean": 0.93,
    "r2_std": 0.02,
}


def chart(**options):
    lines = [
        charts.Line("one", [(0, 0.5), (4, 1.5)], band=[(0, 0.4, 0.6), (4, 1.0, 2.0)]),
        charts.Line(NASTY, [(0, 0.5), (4, float("nan")), (8, -1.0)], thin=[[(0, 0.4), (8, -2.0)]]),
    ]
    return charts.line_chart(lines, title="Gold", x_label="updates", y_label="gold", **options)


PICTURES = {
    "lines": lambda: chart(level=(0.7, NASTY)),
    "normalizer": lambda: charts.normalizer_chart(FIT),
}


@pytest.mark.parametrize("draw", PICTURES.values(), ids=PICTURES)
def test_pictures_are_well_formed_xml_on_their_own(draw):
    picture = draw()
    root = ET.fromstring(picture)
    assert root.tag.endswith("svg")
    assert "prefers-color-scheme: dark" in picture
    assert "<script" not in picture
    ids = {element.get("id") for element in root.iter()}
    used = [element.get(LINK) for element in root.iter(f"{SVG}use")]
    used += re.findall(r"url\((.*?)\)", picture)
    assert used
    assert {name[1:] for name in used} <= ids
    assert picture.count("href=") + picture.count("url(") == len(used)
    addresses = set(re.findall(r"https?://[^\"' <]+", picture))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


@pytest.mark.parametrize("draw", PICTURES.values(), ids=PICTURES)
def test_every_colour_follows_the_reader(draw):
    root = ET.fromstring(draw())
    styles = " ".join(element.get("style", "") for element in root.iter())
    assert not re.search("#[0-9a-f]{6}|rgb", styles)
    assert set(re.findall(r"var\(--(\w+)\)", styles)) <= set(page.COLOURS)
    for text in root.iter(f"{SVG}text"):
        assert "fill: var(--" in text.get("style")


@pytest.mark.parametrize("draw", PICTURES.values(), ids=PICTURES)
def test_the_same_data_gives_the_same_bytes(draw):
    first = draw()
    with matplotlib.rc_context({"font.size": 30, "lines.linewidth": 9, "svg.fonttype": "path"}):
        assert draw() == first  # whatever the reader's matplotlibrc says


def test_text_is_written_as_it_is():
    root = ET.fromstring(chart(level=(0.7, NASTY)))
    assert [text.text for text in root.iter(f"{SVG}text")].count(NASTY) == 2


def test_chart_draws_every_finite_point_inside_its_frame():
    root = ET.fromstring(chart())
    marks = [use for use in root.iter(f"{SVG}use") if use.find(f"{SVG}title") is not None]
    assert sum("at updates" in mark.find(f"{SVG}title").text for mark in marks) == 4
    assert len(marks) == 4
    width, height = (float(x) for x in root.get("viewBox").split()[2:])
    for mark in marks:
        assert 0 < float(mark.get("x")) < width
        assert 0 < float(mark.get("y")) < height


def test_chart_of_one_point_has_axes():
    svg = charts.line_chart([charts.Line("a", [(0, 2.0)])], title="t", x_label="x", y_label="y")
    assert {"x", "y"} <= {text.text for text in ET.fromstring(svg).iter(f"{SVG}text")}


def test_chart_errors():
    with pytest.raises(ValueError, match="at least one finite point, got none"):
        charts.line_chart([charts.Line("a", [])], title="t", x_label="x", y_label="y")
    many = [charts.Line(str(i), [(0, 0)]) for i in range(6)]
    with pytest.raises(ValueError, match="lines: expected at most 5, got 6"):
        charts.line_chart(many, title="t", x_label="x", y_label="y")


def test_normalizer_picture_states_r2():
    svg = charts.normalizer_chart(FIT)
    assert "R² of the log line 0.93" in svg
    assert "R² of the log line 0.020" in svg
    one = FIT | {k: FIT[k][-1:] for k in ("positions", "means", "stds", "counts")}
    ET.fromstring(charts.normalizer_chart(one))


def test_rare_positions_do_not_flatten_the_normalizer_picture():
    n = 400
    fit = FIT | {
        "positions": [(i + 1) / n for i in range(n)],
        "means": [0.5] * (n - 1) + [1e6],
        "stds": [1.0] * n,
        "counts": [10.0] * (n - 1) + [1.0],
    }
    svg = charts.normalizer_chart(fit)
    assert "e+06" not in svg
    assert "1000000" not in svg
    assert "1e6" not in svg
    assert svg.count("<title>") == 2 * n - 1


def test_matplotlib_is_imported_only_to_draw():
    code = "import sys, segrlhf.charts, segrlhf.page; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.filterwarnings("ignore:Glyph")
def test_characters_that_xml_cannot_hold():
    strange = "a\x00b\x1b\ufffe" + NASTY
    labels = dict.fromkeys(("title", "x_label", "y_label"), strange)
    lines = [charts.Line(strange, [(0.0, 1.0), (1.0, 2.0)])]
    picture = charts.line_chart(lines, **labels, level=(1.5, strange))
    assert "a\ufffdb\ufffd" in "".join(ET.fromstring(picture).itertext())
