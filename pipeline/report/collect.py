"""Collect every trained cell (variant x seed) into one summary, one table of curves and one page that opens offline.

    OUT/summary.json   all figures, for programs
    OUT/curves.tsv     one row per cell and optimizer step, unthinned, for `dvc plots`
    OUT/table.md       the held-out results as one table, to paste
    OUT/table.tex      the same for LaTeX, with booktabs
    OUT/index.html     the page, for people; loads nothing from anywhere

The same inputs give the same bytes: nothing here reads a clock. Nothing outside OUT is written.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any
from urllib.parse import quote

import polars as pl

from pipeline.errors import RequestError
from pipeline.files import write_json, write_text
from pipeline.report.answers import read_answers, reward_beta
from pipeline.report.page import render_page
from pipeline.report.paper import latex_table, markdown_table
from pipeline.report.scores import scores_over_seeds

Figures = dict[str, Any]  # parsed JSON

CELL_COLUMNS = ("variant", "seed", "cell", "step")
# The order people read them in; metrics of other objectives follow in the order of their history.
METRICS = (
    "epoch",
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "dcr",
    "nll/chosen",
    "in_distribution_logp",
    "grad_norm",
    "lr",
    "tokens_per_second",
)
PHASE_1_FIGURES = (
    "responses",
    "rows_scored",
    "rows_reused",
    "tokens_scored",
    "response_tokens",
    "seconds",
    "rows_per_second",
    "tokens_per_second",
    "reference_id",
    "drift",
    "identity",
)
# Labels, and what has a place of its own in the summary.
TRAINED = ("trained_parameters", "parameters", "adapted")
NOT_AVERAGED = ("variant", "seed", "hyperparameters", "adapted", "categories", "reference", "tasks", "suites")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One trained and evaluated policy."""

    variant: str
    seed: int
    history: pl.DataFrame  # strings, as they stand in the file
    train: Figures
    evaluate: Figures

    @property
    def name(self) -> str:
        return f"{self.variant}-{self.seed}"


def write_report(
    *,
    prepared: Path,
    sft: Path,
    score: Path,
    results: Path,
    out: Path,
    variants: Sequence[str],
    seeds: Sequence[int],
    settings: Mapping[str, Any] | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    models: Path = Path("models/policies"),
    reference: Path = Path("data/reference/logps"),
    title: str = "Preference optimisation report",
) -> Path:
    """Write summary.json, curves.tsv, table.md, table.tex and index.html under `out`; return the page.

    prepared, sft, score: the metric files of phase 1. results: folder with <cell>/history.tsv, <cell>/train.json and
    evaluate/<cell>.json of each cell <variant>-<seed>, and answers/<cell>/samples.parquet where it sampled any; cells
    outside variants x seeds are ignored. settings: training settings that all variants share, and overrides: those of
    one variant; both only shown. models, reference: only linked to, relative to the page. Raises RequestError for a
    cell or file that is missing or unreadable; then `out` is untouched.
    """
    phase_1 = {"prepared": _read_json(prepared), "sft": _read_json(sft), "score": _read_json(score)}
    cells = read_cells(results, variants, seeds)
    summary = summarise(phase_1, cells, title)
    summary["settings"] = _finite({"train": dict(settings or {}), "variants": dict(overrides or {})})
    curves = curves_table(cells)
    pasted = {"table.md": markdown_table(summary), "table.tex": latex_table(summary)}
    first_seeds = {cell.variant: cell for cell in reversed(cells)}
    betas = {first_seeds[name].name: reward_beta(first_seeds[name].train.get("hyperparameters")) for name in variants}
    page = render_page(
        summary,
        numeric_curves(curves),
        links=_links(cells, out, results=results, models=models),
        files={
            "reference cache": _relative(reference, out),
            "scoring metrics": _relative(score, out),
            "preparation summary": _relative(prepared, out),
            "sft metrics": _relative(sft, out),
        },
        pasted=pasted,
        reader=read_answers(results / "answers", betas),
    )
    write_json(out / "summary.json", summary, indent=2)
    write_text(out / "curves.tsv", curves.write_csv(separator="\t"))
    for name, text in pasted.items():
        write_text(out / name, text)
    write_text(out / "index.html", page)  # last: it means that the others are there
    return out / "index.html"


def read_cells(results: Path, variants: Sequence[str], seeds: Sequence[int]) -> list[Cell]:
    """The cells variants x seeds, variants in the order given. RequestError names every cell that is not there."""
    wanted = [(variant, seed) for variant in variants for seed in seeds]
    absent = []
    for name in (f"{variant}-{seed}" for variant, seed in wanted):
        lacking = [file for file in _files(name) if not (results / file).is_file()]
        absent += [f"{name} ({', '.join(lacking)})"] if lacking else []
    if absent:
        raise RequestError(
            f"{results} lacks cells of the sweep: {', '.join(absent)}. A report of the rest would hide that. "
            "Run `dvc repro` to train and evaluate them, or take them out of sweep in params.yaml."
        )
    return [_read_cell(results, variant, seed) for variant, seed in wanted]


def _files(cell: str) -> tuple[str, str, str]:
    """History, training and evaluation of a cell, relative to the results."""
    return f"{cell}/history.tsv", f"{cell}/train.json", f"evaluate/{cell}.json"


def _read_cell(results: Path, variant: str, seed: int) -> Cell:
    path, train, evaluation = (results / file for file in _files(f"{variant}-{seed}"))
    try:
        history = pl.read_csv(path, separator="\t", infer_schema=False, quote_char=None)
    except (pl.exceptions.PolarsError, UnicodeDecodeError) as error:
        raise RequestError(f"{path} is not a tab-separated table ({error}); run `dvc repro -f train`.") from None
    if "step" not in history.columns or history.is_empty():
        found = f"columns {history.columns}" if history.columns else "nothing"
        raise RequestError(
            f"{path} has {found} and {history.height} rows; a finished training writes a column step and one row per "
            "optimizer step. Run `dvc repro -f train`."
        )
    return Cell(
        variant=variant,
        seed=seed,
        history=history,
        train=_read_json(train),
        evaluate=_read_json(evaluation),
    )


def summarise(phase_1: Mapping[str, Figures], cells: Sequence[Cell], title: str) -> Figures:
    """What summary.json holds; values that are NaN or infinite become null."""
    score = phase_1["score"]
    variants = list(dict.fromkeys(cell.variant for cell in cells))
    evaluations = [cell.evaluate for cell in cells]
    figures: Figures = _finite(
        {
            "format_version": 1,
            "title": title,
            "phase_1": {name: score.get(name) for name in PHASE_1_FIGURES},
            **phase_1,
            "reference": _over_seeds(map(_reference_figures, evaluations))
            | scores_over_seeds(evaluations, of_reference=True),
            "variants": {name: _statistics([cell for cell in cells if cell.variant == name]) for name in variants},
            "cells": {
                cell.name: {
                    "variant": cell.variant,
                    "seed": cell.seed,
                    "training": cell.train,
                    "evaluation": cell.evaluate,
                }
                for cell in cells
            },
        }
    )
    return figures


def _statistics(cells: Sequence[Cell]) -> Figures:
    """Mean and sample standard deviation over the seeds of one variant; the deviation of a single seed is null."""
    first = cells[0].train
    categories: dict[str, list[Figures]] = {}
    for cell in cells:
        for name, figures in (cell.evaluate.get("categories") or {}).items():
            categories.setdefault(name, []).append(figures)
    return {
        "objective": first.get("objective"),
        "hyperparameters": first.get("hyperparameters") or {},
        "trained": {name: first[name] for name in TRAINED if name in first},
        "seeds": [cell.seed for cell in cells],
        "training": _over_seeds([cell.train for cell in cells]),
        "evaluation": _over_seeds([cell.evaluate for cell in cells]),
        "categories": {name: _over_seeds(rows) for name, rows in sorted(categories.items())},
        **scores_over_seeds([cell.evaluate for cell in cells]),
    }


def _reference_figures(evaluation: Figures) -> Figures:
    reward = (evaluation.get("expected_reward") or {}).get("reference")
    return {**(evaluation.get("reference") or {}), "expected_reward": reward}


def _over_seeds(rows: Iterable[Figures]) -> dict[str, Figures]:
    """{name: {"mean", "standard_deviation", "seeds"}} of every number; one level of nesting as outer/inner."""
    values: dict[str, list[float]] = {}
    for row in rows:
        flat = {name: value for name, value in row.items() if name not in NOT_AVERAGED}
        for outer in [name for name, value in flat.items() if isinstance(value, Mapping)]:
            flat |= {f"{outer}/{name}": value for name, value in flat.pop(outer).items()}
        for name, value in flat.items():
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
                values.setdefault(name, []).append(value)
    return {
        name: {
            "mean": fmean(found),
            "standard_deviation": stdev(found) if len(found) > 1 else None,
            "seeds": len(found),
        }
        for name, found in values.items()
    }


def curves_table(cells: Sequence[Cell]) -> pl.DataFrame:
    """All histories below each other, as text and unthinned; a metric that a cell does not have is empty."""
    tables = [
        cell.history.with_columns(
            pl.lit(cell.variant).alias("variant"), pl.lit(str(cell.seed)).alias("seed"), pl.lit(cell.name).alias("cell")
        )
        for cell in cells
    ]
    table = pl.concat(tables, how="diagonal")
    known = [name for name in METRICS if name in table.columns]
    return table.select(*CELL_COLUMNS, *known, pl.exclude(*CELL_COLUMNS, *known))


def numeric_curves(curves: pl.DataFrame) -> pl.DataFrame:
    """The table with float64 metrics; NaN and infinities become null, so that a curve shows a gap there."""
    metrics = pl.exclude("variant", "seed", "cell", "step")
    try:
        table = curves.with_columns(pl.col("seed", "step").cast(pl.Int64), metrics.cast(pl.Float64))
    except pl.exceptions.PolarsError as error:
        raise RequestError(f"A history.tsv holds something that is no number: {error}") from None
    return table.with_columns(pl.when(metrics.is_finite()).then(metrics))


def _links(cells: Sequence[Cell], out: Path, *, results: Path, models: Path) -> dict[str, dict[str, str]]:
    names = ("history", "training", "evaluation")
    return {
        cell.name: {name: _relative(results / file, out) for name, file in zip(names, _files(cell.name), strict=True)}
        | {"answers": _relative(results / "answers" / cell.name / "samples.parquet", out)}
        | {"model": _relative(models / cell.name, out)}
        for cell in cells
    }


def _relative(path: Path, folder: Path) -> str:
    """A relative URL; a name with '#', '?' or ':' in it still means the file."""
    return quote(Path(os.path.relpath(path, folder)).as_posix())


def _read_json(path: Path) -> Figures:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RequestError(f"{path} does not exist; an earlier stage writes it. Run `dvc repro`.") from None
    except ValueError as error:
        raise RequestError(f"{path} is not valid JSON ({error}); run the stage that wrote it again.") from None
    if not isinstance(content, dict):
        raise RequestError(f"{path} holds {type(content).__name__}, expected an object of metrics.")
    return content


def _finite(value: Any) -> Any:
    """`value` with NaN and infinities as None: JSON knows neither, and browsers refuse them."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(name): _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value
