"""Numbers and tables."""

import pytest
from strict_html import Strict

from segrlhf.tables import Table, number

NASTY = "<script>alert('x')</script> & \"quoted\""


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (float("nan"), "-"), (0, "0"), (0.66, "0.660"), (123.4, "123"), (-2.0, "-2.00"),
     (0.00001, "0.0000")],
)  # fmt: skip
def test_numbers(value, text):
    assert number(value) == text


def test_table_as_html_markdown_and_text():
    table = Table(["", "a|b"], [["x", NASTY], ["longer", "1"]])
    Strict(table.html())
    assert "<script" not in table.html()
    assert table.markdown().splitlines()[:2] == ["|  | a\\|b |", "|---|---:|"]
    lines = table.text().splitlines()
    assert lines[2].endswith("1")
    assert len(lines[1]) == len(lines[2])
