"""Pages and pictures: whole, self-contained, escaped."""

import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest

from segkernels.normalizer import LocationNormalizer, TableNormalizer
from segrlhf import report

NASTY = "<script>alert('x')</script> & \"quoted\""
ROWS = [
    {
        "prompt": f"Say {NASTY}",
        "segments": [("good ", 1.25), (NASTY, -0.5), ("\nend", None)],
        "score": 0.375,
        "label": NASTY,
    },
    {"prompt": "", "segments": [], "score": None, "label": None},
]
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


class Strict(HTMLParser):
    """Collects tags and attributes, and insists that what is opened is closed."""

    VOID = ("meta", "br", "circle", "path", "rect")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def assert_self_contained(page):
    parsed = Strict(page)
    assert not {"script", "link", "img", "iframe", "object"} & set(parsed.tags)
    names = {name for name, _ in parsed.attributes}
    assert not {"href", "src", "onclick", "onload"} & names
    assert "@import" not in page
    assert "url(" not in page
    addresses = set(re.findall(r"https?://[^\"' <]+", page))
    assert addresses <= {"http://www.w3.org/2000/svg"}
    return parsed


def test_responses_page_is_self_contained_and_escaped():
    page = report.responses_html(ROWS, NASTY)
    parsed = assert_self_contained(page)
    assert parsed.text.count(NASTY) == 5  # title, heading, label, prompt, segment
    rewards = [value for name, value in parsed.attributes if name == "data-reward"]
    assert rewards == ["+1.250", "-0.500"]


def test_segments_are_coloured_by_sign_and_size():
    page = report.response_blocks(ROWS)
    assert "rgba(var(--good), 0.650)" in page
    assert "rgba(var(--bad), 0.260)" in page


def chart(**options):
    lines = [
        report.Line("one", [(0, 0.5), (4, 1.5)], band=[(0, 0.4, 0.6), (4, 1.0, 2.0)]),
        report.Line(NASTY, [(0, 0.5), (4, float("nan")), (8, -1.0)], thin=[[(0, 0.4), (8, -2.0)]]),
    ]
    return report.line_chart_svg(lines, title="Gold", x_label="updates", y_label="gold", **options)


@pytest.mark.parametrize(
    "svg", [chart(level=(0.7, "level")), report.normalizer_svg(FIT), report.responses_svg(ROWS)]
)
def test_pictures_are_well_formed_xml_on_their_own(svg):
    picture = report.standalone(svg)
    root = ET.fromstring(picture)
    assert root.tag.endswith("svg")
    assert "prefers-color-scheme: dark" in picture
    assert "<script" not in picture
    assert "href" not in picture


def test_chart_draws_every_finite_point_inside_its_frame():
    root = ET.fromstring(chart())
    space = "{http://www.w3.org/2000/svg}"
    tips = [t.text for t in root.iter(f"{space}title")]
    assert sum("at updates" in tip for tip in tips) == 4
    width, height = (float(x) for x in root.get("viewBox").split()[2:])
    for dot in root.iter(f"{space}circle"):
        assert 0 < float(dot.get("cx")) < width
        assert 0 < float(dot.get("cy")) < height


def test_chart_of_one_point_has_axes():
    svg = report.line_chart_svg([report.Line("a", [(0, 2.0)])], title="t", x_label="x", y_label="y")
    ET.fromstring(svg)


def test_chart_errors():
    with pytest.raises(ValueError, match="at least one finite point, got none"):
        report.line_chart_svg([report.Line("a", [])], title="t", x_label="x", y_label="y")
    many = [report.Line(str(i), [(0, 0)]) for i in range(6)]
    with pytest.raises(ValueError, match="lines: expected at most 5, got 6"):
        report.line_chart_svg(many, title="t", x_label="x", y_label="y")


def test_normalizer_picture_states_r2():
    svg = report.normalizer_svg(FIT)
    assert "R² of the log line 0.93" in svg
    assert "R² of the log line 0.020" in svg
    one = FIT | {k: FIT[k][-1:] for k in ("positions", "means", "stds", "counts")}
    ET.fromstring(report.normalizer_svg(one))


def test_rare_positions_do_not_flatten_the_normalizer_picture():
    n = 400
    fit = FIT | {
        "positions": [(i + 1) / n for i in range(n)],
        "means": [0.5] * (n - 1) + [1e6],
        "stds": [1.0] * n,
        "counts": [10.0] * (n - 1) + [1.0],
    }
    svg = report.normalizer_svg(fit)
    assert "e+06" not in svg
    assert "1000000" not in svg
    assert svg.count("<title>") == 2 * n - 1


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (-0.3, 0.9, [-0.5, 0.0, 0.5, 1.0]),
        (3, 3, [2.4, 2.6, 2.8, 3.0, 3.2, 3.4, 3.6]),
        (0, 109, [0, 50, 100, 150]),
    ],
)
def test_ticks_are_round_and_cover_the_data(low, high, expected):
    found = report.ticks(low, high)
    assert found[0] <= low
    assert found[-1] >= high
    if low != high:
        assert found == pytest.approx(expected)


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (float("nan"), "-"), (0, "0"), (0.66, "0.660"), (123.4, "123"), (-2.0, "-2.00"),
     (0.00001, "0.0000")],
)  # fmt: skip
def test_numbers(value, text):
    assert report.number(value) == text


def test_table_as_html_markdown_and_text():
    table = report.Table(["", "a|b"], [["x", NASTY], ["longer", "1"]])
    Strict(table.html())
    assert "<script" not in table.html()
    assert table.markdown().splitlines()[:2] == ["|  | a\\|b |", "|---|---:|"]
    lines = table.text().splitlines()
    assert lines[2].endswith("1")
    assert len(lines[1]) == len(lines[2])


def test_characters_that_xml_cannot_hold():
    strange = "a\x00b\x1b\x7f\ufffe\ud800" + NASTY
    rows = [{**ROWS[0], "prompt": strange, "segments": [(strange, 1.0)], "label": strange}]
    lines = [report.Line(strange, [(0.0, 1.0), (1.0, 2.0)])]
    labels = dict.fromkeys(("title", "x_label", "y_label"), strange)
    chart = report.line_chart_svg(lines, **labels, level=(1.5, strange))
    for picture in (report.responses_svg(rows), chart, report.standalone(chart)):
        ET.fromstring(picture.encode())
    page = report.responses_html(rows, strange)
    assert "<script" not in page
    assert "a\ufffdb\ufffd" in page
    page.encode()
