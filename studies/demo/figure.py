"""The demo study's figure: every policy's figures by what trains, and their differences from DPO's."""

from collections.abc import Iterator, Sequence
from typing import Any

from pipeline.report.charts import colours
from studies.demo.claims import DPO
from studies.demo.results import METRICS, Estimate, PolicyClass, Results
from studies.pages.runs import REFERENCE
from studies.pages.svg import INK, Spec

LEVELS, DIFFERENCES = ("reward", "kl", "dcr"), ("reward", "value", "accuracy")


def spec(results: Results, classes: Sequence[PolicyClass], variants: Sequence[str]) -> Spec:
    """Above: means, bars over seeds. Below: differences from DPO, thick bars over seeds, thin ones over prompts."""
    others = [name for name in variants if name != DPO]
    above = [_panel(METRICS[metric].title, metric, False, classes, variants) for metric in LEVELS]
    below = [_panel(f"{METRICS[metric].title}, less DPO's", metric, True, classes, variants) for metric in DIFFERENCES]
    rows = [
        row
        for metrics, names, differ in ((LEVELS, variants, False), (DIFFERENCES, others, True))
        for metric in metrics
        for each in classes
        for row in _rows(results, each, metric, names, differ)
    ]
    return {"data": {"values": rows}, "columns": 3, "concat": [*above, *below]}


def _rows(
    results: Results, of: PolicyClass, metric: str, variants: Sequence[str], differ: bool
) -> Iterator[dict[str, Any]]:
    for name in variants:
        found = results.difference(of.name, name, DPO, metric) if differ else results.estimate(of.name, name, metric)
        yield {"class": of.title, "variant": name, "metric": metric, "differ": differ, **_ends(found)}
    if metric == "reward" and not differ:
        level = results.estimate(of.name, REFERENCE, metric).value
        yield {"class": of.title, "variant": REFERENCE, "metric": metric, "differ": differ, "level": _short(level)}


def _ends(found: Estimate) -> dict[str, float]:
    ends = {"mean": found.value, "low": found.seeds.low, "high": found.seeds.high}
    ends |= {"bottom": found.prompts.low, "top": found.prompts.high}
    return {name: _short(value) for name, value in ends.items()}


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def _panel(title: str, metric: str, differ: bool, classes: Sequence[PolicyClass], variants: Sequence[str]) -> Spec:
    palette = colours(variants)
    x: Spec = {"field": "class", "type": "nominal", "sort": [each.title for each in classes], "title": None}
    x["axis"] = {"labelAngle": -20, "labelLimit": 140}
    beside = {"field": "variant", "type": "nominal", "sort": list(variants), "scale": {"domain": list(variants)}}
    scale = {"domain": list(palette), "range": list(palette.values())}
    colour = {"field": "variant", "type": "nominal", "title": None, "scale": scale, "legend": {"orient": "bottom"}}
    y = {"type": "quantitative", "title": None, "scale": {"zero": differ}}
    measured = [{"filter": "isValid(datum.mean)"}]
    bars = [("low", "high", 2.5), *([("bottom", "top", 0.8)] if differ else [])]
    layers: list[Spec] = [
        {
            "transform": measured,
            "mark": {"type": "rule", "strokeWidth": width},
            "encoding": {"y": {"field": low, **y}, "y2": {"field": high}, "color": colour, "xOffset": beside},
        }
        for low, high, width in bars
    ]
    layers.append(
        {
            "transform": measured,
            "mark": {"type": "circle", "size": 42, "opacity": 1},
            "encoding": {"y": {"field": "mean", **y}, "color": colour, "xOffset": beside},
        }
    )
    level = {"field": "level", **y} if metric == "reward" else None
    if differ:
        layers.append({"mark": {"type": "rule", "color": INK, "opacity": 0.5}, "encoding": {"y": {"datum": 0}}})
    elif level:
        tick = {"type": "tick", "color": INK, "thickness": 1.2, "size": 44}
        layers.append({"transform": [{"filter": "isValid(datum.level)"}], "mark": tick, "encoding": {"y": level}})
    return {
        "title": title,
        "width": 250,
        "height": 180,
        "transform": [{"filter": f"datum.metric == '{metric}' && datum.differ == {str(differ).lower()}"}],
        "encoding": {"x": x},
        "layer": layers,
    }
