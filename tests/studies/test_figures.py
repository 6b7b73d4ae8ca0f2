"""Figures are drawn offline and stay small; tables are Markdown."""

import pytest

from studies.pages import svg as figures
from studies.pages.markdown import Claim, claims_table, markdown_table
from studies.pages.svg import write_svg

SPEC = {
    "data": {"values": [{"x": x / 3, "y": x} for x in range(20)]},
    "mark": "line",
    "encoding": {"x": {"field": "x", "type": "quantitative"}, "y": {"field": "y", "type": "quantitative"}},
}


def test_a_spec_becomes_an_svg_file_without_marks_of_the_machine(tmp_path):
    write_svg(SPEC, tmp_path / "new" / "line.svg")
    svg = (tmp_path / "new" / "line.svg").read_text()
    assert svg.startswith("<svg") and "aria-" not in svg and svg.endswith("</svg>\n")


def test_compacting_rounds_places_but_not_opacities():
    svg = figures._compact('<path d="M1.234,-5.678" transform="translate(0.04,2)" opacity="0.45" aria-label="1.2"/>')
    assert svg == '<path d="M1.2,-5.7" transform="translate(0,2)" opacity="0.45"/>'


def test_a_figure_too_large_to_commit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "LIMIT", 1000)
    with pytest.raises(ValueError, match="draw fewer points"):
        write_svg(SPEC, tmp_path / "line.svg")
    assert not (tmp_path / "line.svg").exists()


def test_data_from_elsewhere_is_not_fetched(tmp_path):
    with pytest.raises(ValueError):
        write_svg({**SPEC, "data": {"url": "https://example.org/data.json"}}, tmp_path / "line.svg")


def test_tables_have_one_line_for_each_row():
    assert markdown_table(["a", "b"], [("x", 1), ("y", 2)]).splitlines() == [
        "| a | b |",
        "| --- | ---: |",
        "| x | 1 |",
        "| y | 2 |",
    ]
    table = claims_table([Claim("it rises", True, "1 to 2"), Claim("it falls", False, "1 to 2")])
    assert table.splitlines()[2:] == ["| it rises | true | 1 to 2 |", "| it falls | **false** | 1 to 2 |"]
