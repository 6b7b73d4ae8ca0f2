"""The landscapes drawn: a panel per objective, shaded by how its loss ranks in the simplex, and descent's arrows."""

import math
from itertools import pairwise
from typing import Any

import torch

from pipeline.params import AnyVariant
from studies.landscapes.survey import LandscapeParams, Reference, flow, loss, simplex
from studies.pages.svg import Spec

TENTHS = [i / 10 for i in range(1, 10)]
COLUMNS = 41  # points along pi_w of every level
DEPTHS = 400  # pi_l at which the loss is read off, to find a level between two
ARROWS = 10  # along each side
ARROW = 0.06  # length, probability
PANEL = 200  # pixels

W: Spec = {"field": "w", "type": "quantitative", "title": "π(chosen)", "axis": {"tickCount": 5, "grid": False}}
L: Spec = {"field": "l", "type": "quantitative", "title": "π(rejected)", "axis": {"tickCount": 5, "grid": False}}
UNIT: Spec = {"domain": [0, 1], "nice": False}


def bands(variant: AnyVariant, reference: Reference) -> list[dict[str, Any]]:
    """Per tenth of the simplex, by loss: the strip of pi_l that it takes at each pi_w.

    The loss never falls as pi_l grows, so each level is met once at each pi_w.
    """
    w, l = simplex(200)  # noqa: E741
    levels = torch.quantile(loss(variant, reference, w.log(), l.log()), torch.tensor(TENTHS, dtype=torch.float64))
    rows = []
    for w in torch.linspace(0.002, 0.998, COLUMNS, dtype=torch.float64):
        l = torch.linspace(1e-4, 1, DEPTHS, dtype=torch.float64) * (1 - w)  # noqa: E741
        losses = loss(variant, reference, w.log().expand(DEPTHS), l.log())
        below = torch.searchsorted(losses.cummax(dim=0).values, levels)
        edges = [0.0, *(l[min(i, DEPTHS - 1)].item() if i else 0.0 for i in below.tolist()), (1 - w).item()]
        for tenth, (low, high) in enumerate(pairwise(edges), start=1):
            rows.append({"w": round(w.item(), 4), "tenth": tenth, "l": round(low, 4), "l2": round(high, 4)})
    return rows


def arrows(variant: AnyVariant, reference: Reference) -> list[dict[str, float | None]]:
    """Unit steps of descent on a table's logits, from a coarse grid: one line with gaps, a tenth of a mark each."""
    w, l = simplex(ARROWS)  # noqa: E741
    points: list[tuple[float | None, float | None]] = []
    for x, y, dx, dy in zip(*(v.tolist() for v in (w, l, *flow(variant, reference, w, l))), strict=True):
        norm = math.hypot(dx, dy)
        if norm < 1e-12:
            continue
        dx, dy = ARROW * dx / norm, ARROW * dy / norm
        tip = (x + dx, y + dy)
        barbs = [(tip[0] - 0.35 * dx + side * dy, tip[1] - 0.35 * dy - side * dx) for side in (0.25, -0.25)]
        points += [(x, y), tip, barbs[0], tip, barbs[1], (None, None)]
    return [{"w": x, "l": y, "i": i} for i, (x, y) in enumerate(points)]


def panel(name: str, variant: AnyVariant, reference: Reference) -> Spec:
    shade = {
        "field": "tenth",
        "type": "ordinal",
        "scale": {"scheme": "yellowgreenblue", "reverse": True},
        "legend": None,
    }
    at_start = {"values": [{"w": reference.chosen, "l": reference.rejected}]}
    x, y = {**W, "scale": UNIT}, {**L, "scale": UNIT}
    return {
        "title": name,
        "width": PANEL,
        "height": PANEL,
        "layer": [
            {
                "data": {"values": bands(variant, reference)},
                "mark": {"type": "area", "line": False},
                "encoding": {"x": x, "y": {**y, "stack": None}, "y2": {"field": "l2"}, "color": shade},
            },
            {
                "data": {"values": arrows(variant, reference)},
                "mark": {"type": "line", "color": "#b3372f", "strokeWidth": 1, "invalid": "break-paths-show-domains"},
                "encoding": {"x": x, "y": y, "order": {"field": "i"}},
            },
            {
                "data": at_start,
                "mark": {"type": "point", "shape": "cross", "size": 70, "filled": True, "color": "black", "opacity": 1},
                "encoding": {"x": x, "y": y},
            },
        ],
    }


def spec(params: LandscapeParams) -> Spec:
    panels = [panel(name, variant, params.reference) for name, variant in params.objectives.items()]
    return {"concat": panels, "columns": 3, "spacing": 18}
