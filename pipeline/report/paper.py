"""The held-out results as a table to paste: table.md and table.tex.

Variants in rows, the reference first. Mean ± standard deviation over seeds, no ± for one seed; the best mean of a
column is bold, as far as its digits tell.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.report.tables import suites_by_domain, task_rows

# Name among a variant's evaluation figures, among the reference's, heading, whether a share, whether higher is better.
MEASURED = (
    ("rewards/accuracies", None, "reward accuracy", True, True),
    ("rewards/margins", None, "margin", False, True),
    ("kl", None, "KL", False, False),
    ("expected_reward/policy", "expected_reward", "expected reward", False, True),
)
REFERENCE = "reference"

_MARKDOWN = str.maketrans({c: f"\\{c}" for c in "\\`*_{}[]#|~$"} | {"<": "&lt;", ">": "&gt;", "&": "&amp;", "\n": " "})
_LATEX = str.maketrans(
    {c: f"\\{c}" for c in "&%$#_{}"}
    | {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}", "<": r"\textless{}"}
    | {">": r"\textgreater{}", "|": r"\textbar{}", "±": r"$\pm$", "−": "$-$", "\n": " "}
)


@dataclass(frozen=True, kw_only=True)
class Column:
    """One figure of all rows. by_row: {variant or "": (mean, deviation or None)}, "" the reference's, where known."""

    heading: str
    share: bool
    higher_is_better: bool | None
    by_row: Mapping[str, tuple[float, float | None]]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One cell, digits as shown; an absent figure has no mean."""

    mean: str | None = None
    deviation: str | None = None
    best: bool = False


def markdown_table(summary: Mapping[str, Any]) -> str:
    """The table as GitHub's Markdown, and a line that says how to read it."""
    columns = paper_columns(summary)
    head = ["variant", *(_md(_with_unit(column)) for column in columns)]
    body = [[_md(name), *map(_markdown_entry, row)] for name, row in _rows(summary, columns)]
    lines = [head, ["---", *["---:"] * len(columns)], *body]
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", _md(_note(columns))]) + "\n"


def latex_table(summary: Mapping[str, Any]) -> str:
    """The table as a tabular for the package booktabs; what it says about itself is in comments."""
    columns = paper_columns(summary)
    head = ["variant", *(_tex(_with_unit(column)) for column in columns)]
    body = [[_tex(name), *map(_latex_entry, row)] for name, row in _rows(summary, columns)]
    top = [r"% Needs \usepackage{booktabs}.", f"% {_tex(_note(columns))}"]
    top += [rf"\begin{{tabular}}{{l{'r' * len(columns)}}}", r"\toprule"]
    lines = [" & ".join(line) + r" \\" for line in (head, *body)]
    return "\n".join([*top, lines[0], r"\midrule", *lines[1:], r"\bottomrule", r"\end{tabular}"]) + "\n"


def paper_columns(summary: Mapping[str, Any]) -> list[Column]:
    """Every column that some variant has a figure for: the held-out pairs, then tasks, then suites."""
    variants, reference = summary["variants"], summary["reference"]
    columns = [
        Column(
            heading=heading,
            share=share,
            higher_is_better=higher,
            by_row=_by_row(
                reference.get(base) if base else None,
                {variant: figures["evaluation"].get(name) for variant, figures in variants.items()},
            ),
        )
        for name, base, heading, share, higher in MEASURED
    ]
    columns += [
        Column(
            heading=f"{row.task}, {row.metric}",
            share=row.kind == "share",
            higher_is_better=row.higher_is_better,
            by_row=_by_row(row.reference, row.by_variant),
        )
        for row in task_rows(summary)
    ]
    for suite in (name for names in suites_by_domain(summary, "reward_accuracy").values() for name in names):
        measured = {
            variant: (figures.get("suites") or {}).get(suite, {}).get("reward_accuracy")
            for variant, figures in variants.items()
        }
        columns.append(
            Column(
                heading=f"{suite}, reward accuracy", share=True, higher_is_better=True, by_row=_by_row(None, measured)
            )
        )
    return [column for column in columns if column.by_row.keys() - {""}]


def _by_row(
    reference: Mapping[str, Any] | None, by_variant: Mapping[str, Mapping[str, Any] | None]
) -> dict[str, tuple[float, float | None]]:
    """The reference's deviation, if any, isn't one over seeds of its own, and is left out."""
    base = {} if not reference or reference.get("mean") is None else {"": (reference["mean"], None)}
    found = {name: statistic for name, statistic in by_variant.items() if statistic}
    return base | {
        name: (statistic["mean"], statistic["standard_deviation"])
        for name, statistic in found.items()
        if statistic.get("mean") is not None
    }


def _rows(summary: Mapping[str, Any], columns: Sequence[Column]) -> list[tuple[str, list[Entry]]]:
    shown = [_entries(column) for column in columns]
    names = {"": REFERENCE} | {variant: variant for variant in summary["variants"]}
    return [(name, [entries.get(row, Entry()) for entries in shown]) for row, name in names.items()]


def _entries(column: Column) -> dict[str, Entry]:
    """One decimal of a percentage; otherwise three significant digits of the largest mean, for the whole column."""
    scale = 100 if column.share else 1
    largest = max(abs(mean) for mean, _ in column.by_row.values())
    decimals = 1 if column.share else max(0, 2 - math.floor(math.log10(largest))) if largest else 2
    means = {row: f"{scale * mean:.{decimals}f}" for row, (mean, _) in column.by_row.items()}
    best = None
    if column.higher_is_better is not None and len(means) > 1:
        best = (max if column.higher_is_better else min)(map(float, means.values()))
    return {
        row: Entry(
            mean=means[row],
            deviation=None if deviation is None else f"{scale * deviation:.{decimals}f}",
            best=best is not None and float(means[row]) == best,
        )
        for row, (_, deviation) in column.by_row.items()
    }


def _with_unit(column: Column) -> str:
    return f"{column.heading}, %" if column.share else column.heading


def _note(columns: Sequence[Column]) -> str:
    lower = "; ".join(column.heading for column in columns if column.higher_is_better is False)
    return f"Mean ± standard deviation over seeds. Bold: the best of its column{f' (lowest of {lower})' * bool(lower)}."


def _markdown_entry(entry: Entry) -> str:
    if entry.mean is None:
        return "–"
    mean = f"**{entry.mean}**" if entry.best else entry.mean
    return mean if entry.deviation is None else f"{mean} ± {entry.deviation}"


def _latex_entry(entry: Entry) -> str:
    if entry.mean is None:
        return "--"
    mean = entry.mean.replace("-", "$-$")
    mean = rf"\textbf{{{mean}}}" if entry.best else mean
    return mean if entry.deviation is None else rf"{mean} $\pm$ {entry.deviation}"


def _md(text: str) -> str:
    return text.translate(_MARKDOWN)


def _tex(text: str) -> str:
    return text.translate(_LATEX)
