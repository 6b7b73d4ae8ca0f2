"""What the harness found, as evaluate writes it."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import polars as pl


class TaskResults(NamedTuple):
    """figures: {task or group: {"samples", "metrics": {"NAME,FILTER": {"value", "standard_error" (None: unknown),
    "higher_is_better"}}}}. answers: of each task, a row an item and filter: doc_id, filter, prompt, answer (log-
    likelihoods as JSON where those were asked for), target, and a float column for each metric."""

    figures: dict[str, dict[str, Any]]
    answers: dict[str, pl.DataFrame]


def task_results(found: Mapping[str, Any]) -> TaskResults:
    """found: what lm_eval's evaluate returns, with samples."""
    figures = {}
    for name, measured in found["results"].items():
        better = found["higher_is_better"].get(name) or {}
        metrics = {
            key: {
                "value": value,
                "standard_error": _number(measured.get(_error_key(key))),
                "higher_is_better": better.get(key.partition(",")[0]),
            }
            for key in measured
            if "," in key and "_stderr," not in key and (value := _number(measured[key])) is not None
        }
        if total := _ifeval_total(metrics):
            metrics[IFEVAL_TOTAL] = total
        if metrics:
            figures[name] = {"samples": measured.get("sample_len"), "metrics": metrics}
    return TaskResults(figures, {name: _answers(samples) for name, samples in found["samples"].items()})


IFEVAL = [f"{level}_level_{kind}_acc,none" for level in ("prompt", "inst") for kind in ("strict", "loose")]
IFEVAL_TOTAL = "total_acc,none"


def _ifeval_total(metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """The mean of IFEval's four accuracies, as papers state one figure; None for other tasks. Its error is unknown."""
    if not all(name in metrics for name in IFEVAL):
        return None
    mean = sum(metrics[name]["value"] for name in IFEVAL) / len(IFEVAL)
    return {"value": mean, "standard_error": None, "higher_is_better": True}


def _error_key(key: str) -> str:
    metric, _, filter_name = key.partition(",")
    return f"{metric}_stderr,{filter_name}"


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):  # "N/A", " "
        return None
    return number if math.isfinite(number) else None


def _answers(samples: Sequence[Mapping[str, Any]]) -> pl.DataFrame:
    metrics = sorted({metric for sample in samples for metric in sample["metrics"]})
    columns: dict[str, Any] = {
        "doc_id": pl.Series([sample["doc_id"] for sample in samples], dtype=pl.Int64),
        "filter": pl.Series([sample["filter"] for sample in samples], dtype=pl.String),
        "prompt": pl.Series([str(sample["arguments"][-1][0]) for sample in samples], dtype=pl.String),
        "answer": pl.Series([_answer(sample["resps"]) for sample in samples], dtype=pl.String),
        "target": pl.Series([str(sample["target"]) for sample in samples], dtype=pl.String),
    }
    for metric in metrics:
        columns[metric] = pl.Series([_of_item(sample.get(metric)) for sample in samples], dtype=pl.Float64)
    return pl.DataFrame(columns).sort("doc_id", "filter", maintain_order=True)


def _answer(responses: Sequence[Sequence[Any]]) -> str:
    """responses: of each request of an item, one a repeat."""
    flat = [response for of_request in responses for response in of_request]
    if len(flat) == 1 and isinstance(flat[0], str):
        return flat[0]
    return json.dumps([response[0] if isinstance(response, tuple) else response for response in flat])


def _of_item(value: Any) -> float | None:
    """Of a list of verdicts (IFEval's instructions) their mean; None for what is no number of this item alone."""
    if isinstance(value, list) and value and all(isinstance(part, bool | int | float) for part in value):
        return sum(value) / len(value)
    return _number(value)
