"""Render the report's page: figures as text, charts as specs, everything inlined."""

from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from typing import Any

import jinja2
import polars as pl

from pipeline.report import charts
from pipeline.report.answers import ANSWERS, Reader
from pipeline.report.drawings import (
    categories_by_size,
    chart_tables,
    curve_drawings,
    evaluation_drawings,
    points_per_curve,
    task_drawings,
    thin,
)
from pipeline.report.numbers import FILTERS
from pipeline.report.tables import suite_categories, suite_counts, suite_tables, task_rows
from pipeline.report.vega import vega_bundle

# Columns of the results table: name among a variant's evaluation figures, name among the reference's, heading, format.
RESULTS = (
    ("rewards/accuracies", None, "reward accuracy", "share"),
    ("rewards/margins", None, "margin", "number"),
    ("dcr", None, "dcr", "share"),
    ("kl", None, "KL", "number"),
    ("expected_reward/policy", "expected_reward", "expected reward", "number"),
    ("logps/accuracies", "logps/accuracies", "log-prob accuracy", "share"),
    ("nll/chosen", "nll/chosen", "nll of chosen", "number"),
    ("logps/chosen", "logps/chosen", "log p chosen", "number"),
    ("logps/rejected", "logps/rejected", "log p rejected", "number"),
)

WORDS = (
    ("reference", "The frozen model that every policy starts from and is measured against."),
    ("nat", "The natural-log unit of log-probability: one nat less likely is a factor of e ≈ 2.72."),
    ("implicit reward", "β times (log-probability under the policy minus under the reference)."),
    ("reward accuracy", "Share of pairs whose chosen response has the higher implicit reward; guessing gets 50 %."),
    ("log-prob accuracy", "Share of pairs whose chosen response is the more likely one; the reference plays no part."),
    ("margin", "Implicit reward of the chosen minus that of the rejected response, mean over pairs."),
    ("dcr", "Degraded chosen responses: share of pairs whose chosen response lost probability against the reference."),
    ("KL", "KL(policy ‖ reference), nats per response, estimated from the policy's own samples."),
    ("expected reward", "Mean true reward of sampled answers; known only where the data carries its reward."),
    ("nll of chosen", "Negative log-likelihood of chosen responses, nats per token; lower is better."),
    ("log p", "Log-probability of a response, nats, summed over its tokens, mean over pairs."),
    ("drift", "Difference between the stored log-probs and the trainer's own forward pass of the same weights."),
    ("flagged", "A stored row whose log-probability drifts by more than train.drift_tolerance."),
    (
        "typical margin",
        "Median gap between the reference's log-probs within a pair; rewards are β times such gaps.",
    ),
    ("a ± b", "Mean and standard deviation over seeds; a single seed has no deviation."),
)
# Said only where they occur on the page.
SUITE_WORDS = (
    ("suite", "A set of held-out pairs, in or out of the domain of the training pairs."),
    ("best of all", "Share of rows whose every chosen answer scores above every rejected one."),
    ("95 % interval", "Of a suite, over its prompts: the chance in which prompts it has, not in the seed."),
)
ANSWER_WORDS = (
    ("log-ratio", "Log-probability of an answer under the policy minus that under the reference, nats."),
    ("change", "Size of an answer's log-ratio divided by its tokens."),
)
PASTED = (("table.md", "Markdown"), ("table.tex", "LaTeX"))


def render_page(
    summary: Mapping[str, Any],
    curves: pl.DataFrame,
    *,
    links: Mapping[str, Mapping[str, str]],
    files: Mapping[str, str],
    pasted: Mapping[str, str],
    reader: Reader | None = None,
) -> str:
    """The whole page as HTML. summary: as in summary.json. curves: numeric, unthinned. links, files: relative URLs.

    pasted: text of each file of PASTED, shown beside tasks and suites. reader: sampled answers, if there are any.
    """
    palette = charts.colours(list(summary["variants"]))
    points = points_per_curve(len(summary["cells"]))
    thinned = [thin(curve, points) for curve in curves.partition_by("cell", maintain_order=True)]
    evaluation, learning = evaluation_drawings(summary, palette), curve_drawings(thinned, palette)
    tasks, suites = task_drawings(summary, palette), suite_tables(summary)
    measured = [statistics["evaluation"] for statistics in summary["variants"].values()]
    return _template().render(
        summary=summary,
        score=summary["phase_1"],
        prepared=summary["prepared"],
        sft=summary["sft"],
        palette=palette,
        links=links,
        files=files,
        words=(*WORDS, *(SUITE_WORDS if suites else ()), *(ANSWER_WORDS if reader else ())),
        columns=[column for column in RESULTS if any(column[0] in figures for figures in measured)],
        categories=categories_by_size(summary),
        evaluation=evaluation,
        learning=learning,
        tasks=tasks,
        task_rows=task_rows(summary),
        suite_tables=suites,
        suite_counts=suite_counts(summary),
        suite_categories=suite_categories(summary) if suites else {},
        reader=reader,
        answers_shown=ANSWERS,
        answer_links={name: link["answers"] for name, link in links.items()},
        answer_variants={name: cell["variant"] for name, cell in summary["cells"].items()},
        paper=[(file, language, pasted[file]) for file, language in PASTED] if tasks or suites else [],
        tooltip_series=charts.TOOLTIP_SERIES,
        points=points if sum(table.height for table in thinned) < curves.height else None,
        chart_data={
            "tables": chart_tables(summary, thinned),
            "charts": [asdict(drawing) for drawing in (*evaluation, *tasks, *learning)],
        },
        bundle=vega_bundle(),
    )


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pipeline.report", "."),
        autoescape=True,  # names and categories come from data
        undefined=jinja2.ChainableUndefined,  # an optional figure that is absent reaches its filter, which shows a dash
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= FILTERS
    return environment.get_template("report.html.j2")
