"""Several responses with scores or ranks -> pairs of a better and a worse one."""

import math
import random
from collections.abc import Mapping
from itertools import combinations, pairwise
from typing import Any, NamedTuple

from pipeline.params import ColumnNames, RankedParams
from pipeline.published.rows import BadForm, PairRow, asked

PUBLISHED = {
    # openbmb/UltraFeedback as published. Its overall_score is 10 for some responses that were meant to have 1, as the
    # card of argilla/ultrafeedback-binarized-preferences tells; the mean of its four ratings is not.
    "ultrafeedback": RankedParams(column="completions", text="response", score="fine-grained_score", better="higher"),
    # berkeley-nest/Nectar
    "nectar": RankedParams(column="answers", text="answer", score="rank", better="lower"),
}


class _Scored(NamedTuple):
    goodness: float  # the score, or the negative rank
    text: str


def by_score(
    values: Mapping[str, Any], columns: ColumnNames, rule: RankedParams
) -> tuple[list[PairRow], int, set[str]]:
    """The pairs, how many were left out as ties, and the columns that were used. Raises BadForm."""
    assert rule.column is not None and rule.score is not None  # PrepareParams and PUBLISHED see to it
    items = values.get(rule.column)
    if not isinstance(items, list):
        names = ", ".join(map(repr, values))
        raise BadForm(f"{rule.column} is {type(items).__name__}, expected a list of responses (found columns {names})")
    scored, used = _scored(values, items, rule)
    found = asked(values, columns, None)
    pairs = _pairs(scored, rule, f"{rule.seed} {found.prompt}")
    kept = [p for p in pairs if _counts(p, rule)]
    rows = [PairRow(found, better.text, worse.text, better.goodness, worse.goodness) for better, worse in kept]
    return rows, len(pairs) - len(kept), used


def _scored(values: Mapping[str, Any], items: list[Any], rule: RankedParams) -> tuple[list[_Scored], set[str]]:
    """The responses that have a score, the best first, equal ones in their order."""
    assert rule.column is not None and rule.score is not None
    used = {rule.column}
    if all(isinstance(item, str) for item in items):
        scores = values.get(rule.score)
        used.add(rule.score)
        if not isinstance(scores, list) or len(scores) != len(items):
            raise BadForm(f"{rule.score} must hold one number for each of {len(items)} texts of {rule.column}")
        texts = items
    else:
        if rule.text is None:
            raise BadForm(f"{rule.column} holds structs; name the path to their text: prepare.ranked.text")
        texts = [_at(item, rule.text, rule.column) for item in items]
        scores = [_at(item, rule.score, rule.column) for item in items]
    sign = -1.0 if rule.better == "lower" else 1.0
    numbers = [_number(score, rule.score) for score in scores]
    scored = [_Scored(sign * n, t) for n, t in zip(numbers, texts, strict=True) if n is not None]
    return sorted(scored, key=lambda item: -item.goodness), used


def _at(item: Any, path: str, column: str) -> Any:
    """What lies at the end of a dotted path; names that hold dots themselves are tried first."""
    if isinstance(item, dict) and path in item:
        return item[path]
    head, dot, rest = path.partition(".")
    if not isinstance(item, dict) or head not in item or not dot:
        found = ", ".join(map(repr, item)) if isinstance(item, dict) else type(item).__name__
        raise BadForm(f"{column} holds an element without {path!r} (found {found}); see prepare.ranked")
    return _at(item[head], rest, column)


def _number(score: Any, path: str) -> float | None:
    """None for a response that nobody scored: null, or text such as N/A."""
    if score is None or (isinstance(score, str) and score.strip().upper() in ("", "N/A", "NA", "NONE")):
        return None
    try:
        number = float(score)
    except (TypeError, ValueError):
        raise BadForm(f"{path} is {score!r}, expected a number") from None
    return None if math.isnan(number) else number


def _pairs(scored: list[_Scored], rule: RankedParams, seed: str) -> list[tuple[_Scored, _Scored]]:
    if len(scored) < 2:
        return []
    if rule.pairs == "all":
        return list(combinations(scored, 2))
    if rule.pairs == "adjacent":
        return list(pairwise(scored))
    best = scored[0]
    if rule.pairs == "best_vs_worst":
        return [(best, scored[-1])]
    worse = [item for item in scored[1:] if _counts((best, item), rule)] or scored[-1:]
    return [(best, random.Random(seed).choice(worse))]


def _counts(pair: tuple[_Scored, _Scored], rule: RankedParams) -> bool:
    better, worse = pair
    gap = better.goodness - worse.goodness
    return gap > 0 and gap >= rule.min_gap and better.text != worse.text
