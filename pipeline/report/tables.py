"""What the page's tables of tasks and suites show: rows and columns out of summary.json."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

DOMAINS = {"in": "in domain", "out": "out of domain"}  # in the order of the columns; other names follow
# Measure, heading, and what it says.
SUITE_TABLES = (
    ("reward_accuracy", "Reward accuracy", "Pairs whose chosen answer has the higher implicit reward."),
    (
        "token_logp_accuracy",
        "Accuracy by log-probability per token",
        "Pairs whose chosen answer is the more likely one per token; the change is against the reference.",
    ),
    (
        "best_of_reward",
        "Best of all by reward",
        "Rows whose every chosen answer has a higher implicit reward than every rejected one.",
    ),
)


@dataclass(frozen=True, kw_only=True)
class TaskRow:
    """One metric of one task. kind: "share" or "number"; reference, by_variant: statistics as in scores.py."""

    task: str
    metric: str
    samples: int | None
    kind: str
    higher_is_better: bool | None
    reference: Mapping[str, Any]
    by_variant: Mapping[str, Mapping[str, Any]]


def task_rows(summary: Mapping[str, Any]) -> list[TaskRow]:
    """Every metric of every task that any variant has a value of, tasks and metrics in the order of the files."""
    variants = {name: figures.get("tasks") or {} for name, figures in summary["variants"].items()}
    reference = summary["reference"].get("tasks") or {}
    rows = []
    for task in _union(variants.values()):
        having = {name: tasks[task] for name, tasks in variants.items() if task in tasks}
        for metric in _union(figures["metrics"] for figures in having.values()):
            measured = {name: figures["metrics"].get(metric) or {} for name, figures in having.items()}
            by_variant = {name: found for name, found in measured.items() if found.get("mean") is not None}
            if not by_variant:
                continue
            first = next(iter(by_variant.values()))
            # The reference is one model: its figures vary over cells by chance alone, which its standard error tells.
            base = (reference.get(task) or {}).get("metrics", {}).get(metric) or {}
            base = {**base, "standard_deviation": None}
            means = [found["mean"] for found in (*by_variant.values(), base) if found.get("mean") is not None]
            # Perplexities and bits per byte may lie below 1 as well, but there lower is better.
            share = first["higher_is_better"] is not False and all(0 <= mean <= 1 for mean in means)
            rows.append(
                TaskRow(
                    task=task,
                    metric=_metric_label(metric),
                    samples=next(iter(having.values()))["samples"],
                    kind="share" if share else "number",
                    higher_is_better=first["higher_is_better"],
                    reference=base,
                    by_variant=by_variant,
                )
            )
    return rows


def _metric_label(name: str) -> str:
    """exact_match,strict-match -> exact_match (strict-match): the part after the comma says how answers were read."""
    metric, _, reading = name.partition(",")
    return metric if reading in ("", "none") else f"{metric} ({reading})"


def suites_by_domain(summary: Mapping[str, Any], measure: str | None = None) -> dict[str, list[str]]:
    """{domain as shown: suites}, in-domain ones first; with a measure, only suites that some variant has it of."""
    domains: dict[str, list[str]] = {shown: [] for shown in DOMAINS.values()}
    variants = [figures.get("suites") or {} for figures in summary["variants"].values()]
    for suite in _union(variants):
        having = [suites[suite] for suites in variants if suite in suites]
        if measure is None or any(measure in figures for figures in having):
            domain = str(having[0].get("domain") or "other")
            domains.setdefault(DOMAINS.get(domain, domain), []).append(suite)
    return {shown: suites for shown, suites in domains.items() if suites}


@dataclass(frozen=True, kw_only=True)
class SuiteTable:
    """One measure of all suites, variants in rows; the reference has a row where it has the measure."""

    measure: str
    title: str
    caption: str
    domains: dict[str, list[str]]
    with_reference: bool


def suite_tables(summary: Mapping[str, Any]) -> list[SuiteTable]:
    """The tables of SUITE_TABLES that have values."""
    reference = summary["reference"].get("suites") or {}
    tables = [
        SuiteTable(
            measure=measure,
            title=title,
            caption=caption,
            domains=suites_by_domain(summary, measure),
            with_reference=any(measure in figures for figures in reference.values()),
        )
        for measure, title, caption in SUITE_TABLES
    ]
    return [table for table in tables if table.domains]


def suite_categories(summary: Mapping[str, Any]) -> dict[str, dict[str, int | None]]:
    """{suite: {category: its rows}} of the suites that have categories."""
    found: dict[str, dict[str, int | None]] = {}
    for figures in summary["variants"].values():
        for suite, measured in (figures.get("suites") or {}).items():
            for category, inner in (measured.get("categories") or {}).items():
                found.setdefault(suite, {}).setdefault(category, inner.get("rows"))
    return {suite: dict(sorted(categories.items())) for suite, categories in found.items()}


def suite_counts(summary: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """{suite: figures of the first variant that has it}, for its counts."""
    found: dict[str, Mapping[str, Any]] = {}
    for figures in summary["variants"].values():
        for suite, measured in (figures.get("suites") or {}).items():
            found.setdefault(suite, measured)
    return found


def _union(mappings: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for mapping in mappings for name in mapping))
