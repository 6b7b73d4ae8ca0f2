"""Which charts a report shows, and the tables that they draw: only what has values."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from pipeline.report import charts
from pipeline.report.panels import PANELS
from pipeline.report.tables import TaskRow, task_rows

POINTS_PER_CURVE = 300  # a chart is about 500 pixels wide
POINTS_PER_PAGE = 6_000  # rows of `curves`, over all cells; drawing ten charts of 20,000 took a browser a minute
TASK_CHARTS = 24  # a suite of benchmarks may have hundreds of metrics; its table has them all
CURVE_KEYS = ("variant", "v", "cell", "step")


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """One chart of the page. `columns` of `table` are all that its spec reads; `missing`: variants without values."""

    key: str
    title: str
    caption: str
    spec: charts.Spec
    table: str
    columns: tuple[str, ...]
    missing: tuple[str, ...] = ()
    wide: bool = False  # takes the whole width of the page


def curve_drawings(curves: Sequence[pl.DataFrame], palette: dict[str, str]) -> list[Drawing]:
    """One drawing per panel that any cell has values for. curves: thinned, one table per cell."""
    points = max(table.height for table in curves)
    drawings = []
    for panel in PANELS:
        having = {table["variant"][0] for table in curves if _has_values(table, panel.metrics)}
        present = [name for name in panel.metrics if any(_has_values(table, [name]) for table in curves)]
        if not having:
            continue
        drawings.append(
            Drawing(
                key=panel.key,
                title=panel.title,
                caption=panel.caption,
                spec=charts.learning_curve(panel, palette, points=points),
                table="curves",
                columns=(*CURVE_KEYS, *present),
                missing=_without(having, palette),
            )
        )
    return drawings


def evaluation_drawings(summary: Mapping[str, Any], palette: dict[str, str]) -> list[Drawing]:
    """Charts over the held-out figures: reward against KL, KL, accuracy by category; each where it was measured."""
    rows, drawings = cell_rows(summary), []
    cell_columns = tuple(rows[0])
    rewarded = {row["variant"] for row in rows if row["reward"] is not None and row["kl"] is not None}
    if rewarded:
        drawings.append(
            Drawing(
                key="reward",
                title="Expected reward against KL",
                caption="What a policy gains for the distance it went; up and to the left is better. "
                "Bars: one standard error.",
                spec=charts.reward_chart(palette),
                table="cells",
                columns=cell_columns,
                missing=_without(rewarded, palette),
            )
        )
    measured = {row["variant"] for row in rows if row["kl"] is not None}
    if measured:
        drawings.append(
            Drawing(
                key="kl",
                title="KL to the reference",
                caption="How far each policy went, measured on its own samples. Bars: one standard error.",
                spec=charts.kl_chart(palette),
                table="cells",
                columns=cell_columns,
                missing=_without(measured, palette),
            )
        )
    if names := list(categories_by_size(summary)):
        drawings.append(
            Drawing(
                key="categories",
                title="Accuracy by category",
                caption=_category_caption(len(names)),
                spec=charts.category_chart(palette, names[: charts.CHART_CATEGORIES]),
                table="categories",
                columns=("variant", "category", "pairs", "accuracy"),
                wide=True,
            )
        )
    return drawings


def task_drawings(summary: Mapping[str, Any], palette: dict[str, str]) -> list[Drawing]:
    """One small chart per metric of a task, the first TASK_CHARTS of them."""
    return [
        Drawing(
            key=f"task-{index}",
            title=row.task,
            caption=f"{row.metric}{_direction(row)}. Dashed: the reference.",
            spec=charts.task_chart(palette, chart=index, kind=row.kind, description=f"{row.task}: {row.metric}"),
            table="tasks",
            columns=TASK_COLUMNS,
            missing=_without(set(row.by_variant), palette),
        )
        for index, row in enumerate(task_rows(summary)[:TASK_CHARTS])
    ]


def _direction(row: TaskRow) -> str:
    return {True: ", higher is better", False: ", lower is better", None: ""}[row.higher_is_better]


def _category_caption(count: int) -> str:
    largest = f"; the {charts.CHART_CATEGORIES} largest of {count}" if count > charts.CHART_CATEGORIES else ""
    return f"Held-out reward accuracy within each category, mean over seeds{largest}."


def _has_values(table: pl.DataFrame, metrics: Iterable[str]) -> bool:
    return any(name in table.columns and table[name].count() > 0 for name in metrics)


def _without(having: set[str], palette: dict[str, str]) -> tuple[str, ...]:
    return tuple(variant for variant in palette if variant not in having)


# tables ---------------------------------------------------------------------------------------------------------------


def thin(curve: pl.DataFrame, limit: int) -> pl.DataFrame:
    """At most `limit` rows of one cell's numeric curve, each the mean over an equal stretch of steps.

    Means rather than every n-th row: a batch metric is noisy, and sampling it would show one noise instead of another.
    """
    if curve.height <= limit:
        return curve
    stretch = (pl.col("row") * limit // curve.height).alias("stretch")
    figures = pl.exclude("row", "variant", "seed", "cell", "step")
    means = curve.with_row_index("row").group_by(stretch, maintain_order=True)
    table = means.agg(pl.col("variant", "seed", "cell").first(), pl.col("step").median(), figures.mean())
    return table.select(curve.columns).with_columns(pl.col("step").round().cast(pl.Int64))


def points_per_curve(cells: int) -> int:
    return max(20, min(POINTS_PER_CURVE, POINTS_PER_PAGE // max(cells, 1)))


def chart_tables(summary: Mapping[str, Any], curves: Sequence[pl.DataFrame]) -> dict[str, Any]:
    """{name: {"columns", "rows"}}: column names once, then lists of values, a third of the size of objects."""
    tasks = task_chart_rows(summary)
    return {
        "curves": _curve_table(curves, list(summary["variants"])),
        "cells": _columnar(cell_rows(summary)),
        "categories": _columnar(category_rows(summary)),
        **({"tasks": _columnar(tasks)} if tasks else {}),
    }


def _curve_table(curves: Sequence[pl.DataFrame], variants: list[str]) -> dict[str, Any]:
    drawn = {name for panel in PANELS for name in panel.metrics}
    metrics = [name for name in curves[0].columns if name in drawn]
    rows = [
        [row["variant"], variants.index(row["variant"]), row["cell"], row["step"]]
        + [None if row[name] is None else _significant(row[name]) for name in metrics]
        for table in curves
        for row in table.iter_rows(named=True)
    ]
    return {"columns": [*CURVE_KEYS, *metrics], "rows": rows}


def _columnar(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {"columns": list(rows[0]) if rows else [], "rows": [list(row.values()) for row in rows]}


def cell_rows(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for name, cell in summary["cells"].items():
        evaluation = cell["evaluation"]
        reward = evaluation.get("expected_reward") or {}
        row = {"cell": name, "variant": cell["variant"], "seed": cell["seed"]}
        row |= _with_bounds("kl", evaluation.get("kl"), evaluation.get("kl_standard_error"))
        row |= _with_bounds("reward", reward.get("policy"), reward.get("policy_standard_error"))
        rows.append(row | {"reference_reward": reward.get("reference")})
    return rows


def _with_bounds(name: str, value: float | None, error: float | None) -> dict[str, float | None]:
    low, high = (value, value) if value is None or error is None else (value - error, value + error)
    return {name: value, f"{name}_standard_error": error, f"{name}_low": low, f"{name}_high": high}


def category_rows(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per variant and category, means over seeds."""
    return [
        {
            "variant": variant,
            "category": category,
            "pairs": _mean(figures, "pairs"),
            "accuracy": _mean(figures, "rewards/accuracies"),
        }
        for variant, statistics in summary["variants"].items()
        for category, figures in statistics["categories"].items()
    ]


TASK_COLUMNS = ("chart", "variant", "value", "low", "high", "reference", "reference_low", "reference_high")


def task_chart_rows(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per chart of a task and variant; bounds: one deviation over seeds, or a single seed's standard error."""
    rows = []
    for index, task in enumerate(task_rows(summary)[:TASK_CHARTS]):
        base = task.reference
        # The reference is one model: what it differs by is the chance of its own answers.
        reference = _with_bounds("reference", base.get("mean"), base.get("standard_error"))
        for variant, figures in task.by_variant.items():
            spread = figures["standard_deviation"]
            spread = figures["standard_error"] if spread is None else spread
            row = {"chart": index, "variant": variant} | _with_bounds("value", figures["mean"], spread) | reference
            row |= {"low": row["value_low"], "high": row["value_high"]}
            rows.append({name: row[name] for name in TASK_COLUMNS})
    return rows


def _mean(figures: Mapping[str, Any], name: str) -> float | None:
    return (figures.get(name) or {}).get("mean")


def categories_by_size(summary: Mapping[str, Any]) -> dict[str, float]:
    """{category: held-out pairs}, largest first."""
    sizes: dict[str, float] = {}
    for row in category_rows(summary):
        sizes[row["category"]] = max(sizes.get(row["category"], 0), row["pairs"] or 0)
    return dict(sorted(sizes.items(), key=lambda item: (-item[1], item[0])))


def _significant(value: float, digits: int = 5) -> float:
    """Rounded to significant digits: the page draws a few hundred pixels and need not carry 17 digits."""
    if value == 0 or not math.isfinite(value):
        return value
    return round(value, digits - 1 - math.floor(math.log10(abs(value))))
