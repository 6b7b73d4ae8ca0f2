"""Figures of the studies: a Vega-Lite spec to an SVG file, drawn offline by vl-convert."""

import re
from pathlib import Path
from typing import Any

from pipeline.report.charts import FONT

Spec = dict[str, Any]

LIMIT = 200_000  # bytes; figures are committed beside their pages
INK = "#33383e"
# On white, since a file viewed by itself or in a Markdown page has no ink colour to take over.
CONFIG: Spec = {
    "font": FONT,
    "background": "white",
    "padding": 8,
    "view": {"stroke": None},
    "axis": {
        "labelColor": INK,
        "titleColor": INK,
        "gridOpacity": 0.4,
        "domain": False,
        "ticks": False,
        "labelPadding": 5,
        "titleFontWeight": "normal",
        "labelFontSize": 10,
        "titleFontSize": 11,
    },
    "title": {"color": INK, "fontSize": 12, "fontWeight": 600, "anchor": "start"},
    "header": {"labelColor": INK, "titleColor": INK, "labelFontWeight": 600},
    "legend": {"labelColor": INK, "titleColor": INK, "titleFontWeight": "normal"},
}


def write_svg(spec: Spec, path: Path) -> None:
    """Draw `spec`, whose data must be inline, to `path`. ValueError beyond LIMIT bytes: thin the data first."""
    import vl_convert

    svg = _compact(vl_convert.vegalite_to_svg(spec, config=CONFIG, allowed_base_urls=[]))
    if len(svg) > LIMIT:
        raise ValueError(f"{path}: {len(svg):,} bytes of SVG, at most {LIMIT:,} are committed; draw fewer points")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(svg + "\n")


def _compact(svg: str) -> str:
    """Without text for screen readers per mark, empty paths and defaults, coordinates to a tenth of a pixel."""
    svg = re.sub(r' aria-[a-z]+="[^"]*"| role="[^"]*"| pointer-events="none"| (?:stroke-)?opacity="1"', "", svg)
    svg = re.sub(r'<path class="foreground" d="" display="none"/>|<path class="background" d="M0,0h0v0h0Z"/>', "", svg)
    return re.sub(r' (?:d|x|y|x1|x2|y1|y2|transform)="[^"]*"', lambda attribute: _rounded(attribute[0]), svg)


def _rounded(attribute: str) -> str:
    return re.sub(r"-?\d+\.\d{2,}", lambda number: f"{float(number[0]):.1f}".removesuffix(".0"), attribute)
