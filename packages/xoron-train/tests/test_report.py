"""Proves that the report is well-formed, self-contained, and shows the numbers it was given."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from xoron_train.report import loss_curve, render_report

RECORDS = [
    {"kind": "train", "step": 1, "losses": {"text": 5.5}},
    {"kind": "train", "step": 10, "losses": {"text": 2.25}},
    {"kind": "eval", "step": 10, "loss": 2.5},
]


def test_the_page_is_well_formed_and_escapes_what_it_shows() -> None:
    page = render_report(
        "A <run>",
        records=RECORDS,
        scores={"model": 2.1, "order-2": 2.6},
        facts={"steps": "10"},
        prompt="def f(",
        sample="x) -> <b>&</b>",
    )
    body = page.split("<body>")[1].removesuffix("</html>\n").removesuffix("</body>")
    ElementTree.fromstring(f"<body>{body}</body>")  # noqa: S314 - our own text
    assert "x) -&gt; &lt;b&gt;&amp;&lt;/b&gt;" in page
    assert "<b>2.1000</b>" in page
    assert "<td>2.6000</td>" in page
    assert not re.search(r"https?://|src=|@import", page)


def test_the_curve_places_points_in_proportion() -> None:
    svg = ElementTree.fromstring(loss_curve([(0, 4.0), (5, 3.0), (10, 2.0)], [(10, 3.0)]))  # noqa: S314
    line = next(svg.iter("polyline")).attrib["points"]
    (x0, y0), (x1, y1), (x2, y2) = (tuple(map(float, point.split(","))) for point in line.split())
    assert (x1 - x0, y1 - y0) == (pytest.approx(x2 - x1), pytest.approx(y2 - y1))
    assert y0 < y1 < y2  # a falling loss goes down on the page
    dot = next(svg.iter("circle")).attrib
    assert (float(dot["cx"]), float(dot["cy"])) == (x2, y1)
    with pytest.raises(ValueError, match="no training loss"):
        loss_curve([])
