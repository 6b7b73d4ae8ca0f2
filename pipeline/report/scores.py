"""Benchmark tasks and preference suites over seeds: what summary.json holds as `tasks` and `suites`.

A statistic: {"mean", "standard_deviation", "seeds", "standard_error"}, and of suites "low" and "high". The deviation
is the sample's over seeds, null for one; the standard error is that within a seed (root mean square over seeds), null
where no seed has one; low and high bound the 95 % interval over prompts, mean over seeds.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

Figures = dict[str, Any]  # parsed JSON

MEASURES = (
    "reward_accuracy",
    "logp_accuracy",
    "token_logp_accuracy",
    "best_of_reward",
    "best_of_logp",
    "best_of_token_logp",
)
COUNTS = ("pairs", "prompts", "rows")


def scores_over_seeds(evaluations: Sequence[Figures], *, of_reference: bool = False) -> Figures:
    """{"tasks", "suites"} of one variant's cells, each only where a cell has any. of_reference: the reference's share.

    tasks: {task: {"samples", "metrics": {metric: statistic and "higher_is_better"}}}. suites: {suite: {"domain",
    "pairs", "prompts", "rows", <measure>: statistic, "categories": {category: {"rows", <measure>: statistic}}}}.
    """
    tasks = {
        name: {"samples": entries[0].get("samples"), "metrics": _metrics(entries, of_reference)}
        for name, entries in _by_name(evaluations, "tasks").items()
    }
    suites = {name: _suite(entries, of_reference) for name, entries in _by_name(evaluations, "suites").items()}
    return ({"tasks": tasks} if tasks else {}) | ({"suites": suites} if suites else {})


def _metrics(entries: Sequence[Figures], of_reference: bool) -> Figures:
    return {
        name: {**_statistic(rows), "higher_is_better": rows[0].get("higher_is_better")}
        for name, rows in _by_name(entries, "reference" if of_reference else "metrics").items()
    }


def _suite(entries: Sequence[Figures], of_reference: bool) -> Figures:
    figures = {"domain": entries[0].get("domain")} | {name: entries[0].get(name) for name in COUNTS}
    if of_reference:
        return figures | _measures([entry.get("reference") or {} for entry in entries])
    categories = {
        name: {"rows": rows[0].get("rows"), **_measures(rows)}
        for name, rows in sorted(_by_name(entries, "categories").items())
    }
    return figures | _measures(entries) | ({"categories": categories} if categories else {})


def _measures(rows: Sequence[Figures]) -> Figures:
    found = {name: [row[name] for row in rows if row.get(name)] for name in MEASURES}
    return {name: _statistic(measured) for name, measured in found.items() if measured}


def _statistic(rows: Sequence[Figures]) -> Figures:
    values, errors = _numbers(rows, "value"), _numbers(rows, "standard_error")
    figures: Figures = {
        "mean": fmean(values) if values else None,
        "standard_deviation": stdev(values) if len(values) > 1 else None,
        "seeds": len(values),
        "standard_error": math.sqrt(fmean(error**2 for error in errors)) if errors else None,
    }
    return figures | {name: fmean(found) for name in ("low", "high") if (found := _numbers(rows, name))}


def _numbers(rows: Iterable[Figures], name: str) -> list[float]:
    values = [row.get(name) for row in rows]
    return [v for v in values if isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v)]


def _by_name(rows: Iterable[Mapping[str, Any]], key: str) -> dict[str, list[Figures]]:
    """{name: what each row has under it in its object `key`}, in the order of first appearance."""
    found: dict[str, list[Figures]] = {}
    for row in rows:
        for name, figures in (row.get(key) or {}).items():
            found.setdefault(name, []).append(figures)
    return found
