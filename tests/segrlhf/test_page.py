"""Pages and pictures: whole, self-contained, escaped."""

import re
import xml.etree.ElementTree as ET

from strict_html import Strict

from segrlhf import page

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


def assert_self_contained(html):
    parsed = Strict(html)
    assert not {"script", "link", "img", "iframe", "object"} & set(parsed.tags)
    names = {name for name, _ in parsed.attributes}
    assert not {"href", "src", "onclick", "onload"} & names
    assert "@import" not in html
    assert "url(" not in html
    addresses = set(re.findall(r"https?://[^\"' <]+", html))
    assert addresses <= {"http://www.w3.org/2000/svg"}
    return parsed


def test_responses_page_is_self_contained_and_escaped():
    html = page.responses_html(ROWS, NASTY)
    parsed = assert_self_contained(html)
    assert parsed.text.count(NASTY) == 5  # title, heading, label, prompt, segment
    rewards = [value for name, value in parsed.attributes if name == "data-reward"]
    assert rewards == ["+1.250", "-0.500"]


def test_segments_are_coloured_by_sign_and_size():
    html = page.response_blocks(ROWS)
    assert "rgba(var(--good), 0.650)" in html
    assert "rgba(var(--bad), 0.260)" in html


def test_responses_picture_is_well_formed_xml_on_its_own():
    picture = page.responses_svg(ROWS)
    root = ET.fromstring(picture)
    assert root.tag.endswith("svg")
    assert "prefers-color-scheme: dark" in picture
    assert "<script" not in picture
    assert "href" not in picture


def test_characters_that_xml_cannot_hold():
    strange = "a\x00b\x1b\x7f\ufffe\ud800" + NASTY
    rows = [{**ROWS[0], "prompt": strange, "segments": [(strange, 1.0)], "label": strange}]
    ET.fromstring(page.responses_svg(rows).encode())
    html = page.responses_html(rows, strange)
    assert "<script" not in html
    assert "a\ufffdb\ufffd" in html
    html.encode()
