"""The charts of the report as Vega-Lite specs over four named tables.

Tables (JSON rows; the page fills them in once for all charts):
    curves      variant, v (index of the variant), cell, step, <metrics>
    cells       variant, seed, cell, kl, kl_low, kl_high, reward, reward_low, reward_high, ...
    categories  variant, category, pairs, accuracy
    tasks       chart, variant, value, low, high, reference, reference_low, reference_high
"""

from collections.abc import Sequence
from typing import Any

from pipeline.report.panels import Panel

Spec = dict[str, Any]

TOOLTIP_SERIES = 12  # a longer tooltip leaves the screen
CHART_CATEGORIES = 24
REWARD_HEIGHT = 230  # pixels
CHART_WIDTH = 520  # pixels, about; charts fill their place on the page

# Told apart by colour-blind readers, and legible on white and on near-black.
PALETTE = (
    "#4878d0",
    "#d9822b",
    "#2f9e77",
    "#b8538f",
    "#8a7bd1",
    "#c4a000",
    "#3aa6b9",
    "#c0504d",
    "#7f8c5a",
    "#8c6d5c",
)
# currentColor takes the page's ink, so that light and dark need one spec; Vega hands colours through to the SVG.
INK = "currentColor"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


AXIS = {
    "labelColor": INK,
    "titleColor": INK,
    "labelOpacity": 0.75,
    "titleOpacity": 0.75,
    "gridColor": INK,
    "gridOpacity": 0.12,
    "domain": False,
    "ticks": False,
    "labelPadding": 6,
    "titleFontWeight": "normal",
    "labelFontSize": 11,
    "titleFontSize": 11,
}


def colours(variants: Sequence[str]) -> dict[str, str]:
    """One colour per variant, by its place in the sweep; beyond the palette, hues a golden angle apart."""
    spare = [f"hsl({(index * 137.508) % 360:.0f}, 45%, 55%)" for index in range(len(variants))]
    return dict(zip(variants, (*PALETTE, *spare), strict=False))


def learning_curve(panel: Panel, palette: dict[str, str], *, points: int) -> Spec:
    """One line per cell: faint as logged, bold as a centred mean over a tenth of the run; hovering reads all off."""
    metrics = list(panel.metrics)
    y_axis = {"tickCount": 5} | ({"format": panel.axis_format} if panel.axis_format else {})
    y = {"title": panel.axis, "type": "quantitative", "axis": y_axis, "scale": {"zero": False, "nice": True}}
    half = points // 20
    smooth = {
        "window": [{"op": "mean", "field": "value", "as": "smooth"}],
        "frame": [-half, half],
        "groupby": ["cell", "response"],
        "sort": [{"field": "step"}],
    }
    bold = {
        "transform": [smooth],
        "mark": {"type": "line", "strokeWidth": 2, "strokeJoin": "round", "point": points <= 3},
        "encoding": {"y": {"field": "smooth", **y}, **_line_encoding(metrics, palette)},
    }
    faint = {
        "mark": {"type": "line", "strokeWidth": 1, "opacity": 0.22},
        "encoding": {"y": {"field": "value", **y}, **_line_encoding(metrics, palette)},
    }
    layers: list[Spec] = [faint, bold, *_reading_line(panel, list(palette), points)]
    return _spec(
        layers if half else layers[1:],
        table="curves",
        height=210,
        description=panel.title,
        transform=[VISIBLE, {"fold": metrics, "as": ["response", "value"]}, {"filter": "isValid(datum.value)"}],
        encoding={"x": STEP},
    )


def _line_encoding(metrics: list[str], palette: dict[str, str]) -> Spec:
    dashes = {"domain": metrics, "range": [[1, 0], [5, 3]][: len(metrics)]}
    return {
        "detail": {"field": "cell", "type": "nominal"},
        "color": _colour(palette),
        "strokeDash": {"field": "response", "type": "nominal", "scale": dashes, "legend": None},
    }


def _reading_line(panel: Panel, variants: list[str], points: int) -> list[Spec]:
    """A vertical line that follows the pointer and lists every series at its step, mean over seeds.

    An invisible rule per step, wider than the gap to the next, catches the pointer. (Vega-Lite's own `nearest` draws a
    path for each and loses the text of tooltips.)
    """
    metrics = list(panel.metrics)
    transform: list[Spec] = [
        {"calculate": f"'s' + (datum.v * {len(metrics)} + indexof({metrics}, datum.response))", "as": "series"},
        {"pivot": "series", "value": "value", "groupby": ["step"], "op": "mean"},
    ]
    tooltip = [{"field": "step", "type": "quantitative", "title": "step", "format": ",d"}]
    series = [(variant, metric) for variant in variants for metric in metrics]
    for index, (variant, metric) in enumerate(series[:TOOLTIP_SERIES]):
        shown = f"isValid(datum.s{index}) ? format(datum.s{index}, '{panel.number_format}') : '–'"
        transform.append({"calculate": shown, "as": f"t{index}"})
        label = variant if len(metrics) == 1 else f"{variant} {metric.partition('/')[2]}"
        tooltip.append({"field": f"t{index}", "type": "nominal", "title": label})
    select = {"type": "point", "fields": ["step"], "on": "pointerover", "clear": "pointerout"}
    catching = {
        "transform": transform,
        "params": [{"name": "pointer", "select": select}],
        "mark": {"type": "rule", "opacity": 0, "strokeWidth": max(4, 2 * CHART_WIDTH // points)},
        "encoding": {"tooltip": tooltip},
    }
    opacity = {"condition": {"param": "pointer", "empty": False, "value": 0.35}, "value": 0}
    line = {
        "transform": [{"aggregate": [], "groupby": ["step"]}],
        "mark": {"type": "rule", "color": INK, "strokeWidth": 1},
        "encoding": {"opacity": opacity},
    }
    return [line, catching]


def kl_chart(palette: dict[str, str]) -> Spec:
    """KL(policy || reference) of every cell with its standard error."""
    variant = {
        "field": "variant",
        "type": "nominal",
        "title": None,
        "scale": {"domain": list(palette)},
        "axis": {"grid": True, "labelLimit": 220},
    }
    tooltip = [*WHO, _number("kl", "KL"), _number("kl_standard_error", "standard error")]
    return _spec(
        [
            {"mark": {"type": "rule", "strokeWidth": 2}, "encoding": {"x": KL_LOW, "x2": {"field": "kl_high"}}},
            {"mark": {"type": "circle", "size": 70, "opacity": 0.9}, "encoding": {"x": KL, "tooltip": tooltip}},
        ],
        table="cells",
        height=max(REWARD_HEIGHT, 26 * len(palette)),  # thirty variants get a taller chart, not thinner rows
        description="KL to the reference, by variant",
        transform=[VISIBLE, {"filter": "isValid(datum.kl)"}],
        encoding={"y": variant, "color": _colour(palette)},
    )


def reward_chart(palette: dict[str, str]) -> Spec:
    """True expected reward against KL, cell by cell: what a policy gains for the distance it went."""
    reward = {
        "field": "reward",
        "type": "quantitative",
        "title": "expected reward",
        "scale": {"zero": False},
        "axis": {"tickCount": 5},
    }
    bar = {"type": "rule", "strokeWidth": 1.5, "opacity": 0.6}
    numbers = (("reward", "expected reward"), ("reward_standard_error", "standard error"), ("kl", "KL"))
    tooltip = [*WHO, *(_number(field, title) for field, title in numbers)]
    colour = _colour(palette)
    measured = [VISIBLE, {"filter": "isValid(datum.kl) && isValid(datum.reward)"}]
    low, high = {**reward, "field": "reward_low"}, {"field": "reward_high"}
    cells = [
        {"mark": bar, "encoding": {"x": KL_LOW, "x2": {"field": "kl_high"}, "y": reward, "color": colour}},
        {"mark": bar, "encoding": {"x": KL, "y": low, "y2": high, "color": colour}},
        {
            "mark": {"type": "circle", "size": 80, "opacity": 0.95},
            "encoding": {"x": KL, "y": reward, "color": colour, "tooltip": tooltip},
        },
    ]
    level = [
        {"aggregate": [{"op": "mean", "field": "reference_reward", "as": "level"}], "groupby": []},
        {"filter": "isValid(datum.level)"},
    ]
    at = {"field": "level", "type": "quantitative"}
    dashed = {"type": "rule", "strokeDash": [4, 4], "color": INK, "opacity": 0.6}
    name = {"type": "text", "text": "reference", "align": "right", "dx": -4, "dy": -7, "color": INK, "opacity": 0.75}
    return _spec(
        [
            {"transform": level, "mark": dashed, "encoding": {"y": at}},
            *({"transform": measured, **layer} for layer in cells),
            {"transform": level, "mark": name, "encoding": {"y": at, "x": {"value": "width"}}},
        ],
        table="cells",
        height=REWARD_HEIGHT,
        description="Expected reward against KL to the reference",
    )


def category_chart(palette: dict[str, str], categories: Sequence[str]) -> Spec:
    """Held-out reward accuracy by category and variant, mean over seeds."""
    names = list(categories)
    tooltip = [
        {"field": "category", "type": "nominal"},
        {"field": "variant", "type": "nominal"},
        {"field": "accuracy", "type": "quantitative", "format": ".1%"},
        {"field": "pairs", "type": "quantitative", "format": ",d"},
    ]
    x = {
        "field": "accuracy",
        "type": "quantitative",
        "title": "held-out reward accuracy",
        "axis": {"format": "~%", "tickCount": 6},
        "scale": {"zero": False},
    }
    y = {
        "field": "category",
        "type": "nominal",
        "title": None,
        "sort": names,
        "axis": {"grid": True, "labelLimit": 200},
    }
    points = {"type": "circle", "size": 70, "opacity": 0.9}
    return _spec(
        [{"mark": points, "encoding": {"x": x, "y": y, "color": _colour(palette), "tooltip": tooltip}}],
        table="categories",
        height=40 + 26 * len(names),
        description="Held-out reward accuracy by category",
        transform=[VISIBLE, {"filter": {"field": "category", "oneOf": names}}],
    )


def task_chart(palette: dict[str, str], *, chart: int, kind: str, description: str) -> Spec:
    """One metric of a task by variant with intervals, before the reference's as a dashed line in its band."""
    percent = kind == "share"
    x = {
        "field": "value",
        "type": "quantitative",
        "title": None,
        "axis": {"tickCount": 6} | ({"format": "~%"} if percent else {}),
        "scale": {"zero": False},
    }
    y = {
        "field": "variant",
        "type": "nominal",
        "title": None,
        "scale": {"domain": list(palette)},
        "axis": {"grid": True, "labelLimit": 220},
    }
    form = ".1%" if percent else ".4~g"
    fields = (("value", "value"), ("low", "from"), ("high", "to"), ("reference", "reference"))
    tooltip: list[Spec] = [{"field": "variant", "type": "nominal"}]
    tooltip += [{"field": field, "type": "quantitative", "title": title, "format": form} for field, title in fields]
    colour = _colour(palette)
    # The reference stays when the legend hides variants; one row stands for all, as they carry the same value.
    level = [
        {"aggregate": [{"op": "min", "field": name, "as": name} for name in REFERENCE_LEVEL], "groupby": []},
        {"filter": "isValid(datum.reference)"},
    ]
    at = {name: {"field": name, "type": "quantitative"} for name in REFERENCE_LEVEL}
    band = {"x": {**x, "field": "reference_low"}, "x2": {"field": "reference_high"}}
    return _spec(
        [
            {"transform": level, "mark": {"type": "rect", "color": INK, "opacity": 0.08}, "encoding": band},
            {
                "transform": level,
                "mark": {"type": "rule", "strokeDash": [4, 4], "color": INK, "opacity": 0.6},
                "encoding": {"x": at["reference"]},
            },
            {
                "transform": [VISIBLE],
                "mark": {"type": "rule", "strokeWidth": 2},
                "encoding": {"x": {**x, "field": "low"}, "x2": {"field": "high"}, "y": y, "color": colour},
            },
            {
                "transform": [VISIBLE],
                "mark": {"type": "circle", "size": 70, "opacity": 0.9},
                "encoding": {"x": x, "y": y, "color": colour, "tooltip": tooltip},
            },
        ],
        table="tasks",
        height=max(60, 26 * len(palette)),
        description=description,
        transform=[{"filter": f"datum.chart == {chart}"}],
    )


REFERENCE_LEVEL = ("reference", "reference_low", "reference_high")

# `hidden` is set by the page's legend, for all charts at once.
VISIBLE: Spec = {"filter": "indexof(hidden, datum.variant) < 0"}
STEP: Spec = {
    "field": "step",
    "type": "quantitative",
    "title": "optimizer step",
    "axis": {"grid": False, "tickMinStep": 1, "tickCount": 8},
}
KL: Spec = {
    "field": "kl",
    "type": "quantitative",
    "title": "KL(policy ‖ reference), nats per response",
    "axis": {"tickCount": 6},
}
KL_LOW: Spec = {**KL, "field": "kl_low"}
WHO: list[Spec] = [{"field": "variant", "type": "nominal"}, {"field": "seed", "type": "quantitative", "format": "d"}]


def _number(field: str, title: str) -> Spec:
    return {"field": field, "type": "quantitative", "title": title, "format": ".4~g"}


def _colour(palette: dict[str, str]) -> Spec:
    scale = {"domain": list(palette), "range": list(palette.values())}
    return {"field": "variant", "type": "nominal", "scale": scale, "legend": None}  # one legend on the page serves all


def _spec(layers: list[Spec], *, table: str, height: int, description: str, **shared: Any) -> Spec:
    return {
        "description": description,
        "data": {"name": table},
        "width": "container",
        "height": height,
        "autosize": {"type": "fit-x", "contains": "padding"},
        "params": [{"name": "hidden", "value": []}],
        **shared,
        "layer": layers,
        "config": {"font": FONT, "background": "transparent", "view": {"stroke": None}, "axis": AXIS},
    }
