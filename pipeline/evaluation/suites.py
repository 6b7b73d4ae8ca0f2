"""What a policy's log-probs of a suite's answers come to, as functions of arrays; no engine, no files.

An answer is judged by its implicit reward, beta * (log pi - log pi_ref), by its summed log-prob, and by its mean
log-prob per token. A row of the input is a question: its pairs are every chosen answer with every rejected one.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.evaluation.intervals import clustered_mean
from pipeline.params.suites import TIES_ID

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

TIES = "Ties"  # RewardBench 2's name for the subset
_ACCURACIES = {"reward": "reward_accuracy", "logp": "logp_accuracy", "token_logp": "token_logp_accuracy"}
_OF_CATEGORIES = ("reward_accuracy", "token_logp_accuracy", "best_of_reward")


class Sums(NamedTuple):
    """Summed log-probs under one model, nats, of each pair's answers: both (n_pairs,)."""

    chosen: Floats
    rejected: Floats


class SuiteLayout(NamedTuple):
    """What a suite's pairs consist of. All (n_pairs,); prompts, answers and rows are numbered, in any way."""

    prompt: Ints
    row: Ints
    chosen: Ints
    rejected: Ints
    chosen_tokens: Ints
    rejected_tokens: Ints
    category: npt.NDArray[np.object_]  # text or None
    row_id: npt.NDArray[np.object_]  # the input row's own id, text or None

    def select(self, where: Bools) -> "SuiteLayout":
        return SuiteLayout(**{name: column[where] for name, column in self._asdict().items()})


def suite_metrics(layout: SuiteLayout, policy: Sums, reference: Sums, *, beta: float, ties: bool) -> dict[str, Any]:
    """What the report shows of one suite (docs/report.md), for at least one pair.

    Counts; each accuracy over pairs and each best_of_* over rows, as statistics of `clustered_mean` by prompt; those of
    the reference itself, as `reference`; and `categories`, where there are any. A tie is no win. ties: rows with ids
    ref:N and tied:N get the published score, as `ties`, and no part in best_of_*.
    """
    scores = {"reward": _rewards(policy, reference, beta), **_plain_scores(layout, policy)}
    own = _plain_scores(layout, reference)
    apart = ties_rows(layout) if ties else np.zeros(len(layout.row), dtype=bool)
    content = {
        "pairs": len(layout.row),
        "prompts": len(np.unique(layout.prompt)),
        "rows": len(np.unique(layout.row)),
        **_measures(layout, scores, apart),
        "reference": _measures(layout, own, apart),
    }
    if categories := _categories(layout, scores, apart):
        content["categories"] = categories
    if apart.any():
        for of, into in ((scores, content), (own, content["reference"])):
            into["ties"] = {name: ties_score(layout.select(apart), _select(pair, apart)) for name, pair in of.items()}
    return content


def _rewards(policy: Sums, reference: Sums, beta: float) -> Sums:
    return Sums(beta * (policy.chosen - reference.chosen), beta * (policy.rejected - reference.rejected))


def _plain_scores(layout: SuiteLayout, sums: Sums) -> dict[str, Sums]:
    """What answers are judged by without a reference."""
    per_token = Sums(sums.chosen / layout.chosen_tokens, sums.rejected / layout.rejected_tokens)
    return {"logp": sums, "token_logp": per_token}


def _select(pair: Sums, where: Bools) -> Sums:
    return Sums(*(column[where] for column in pair))


def _measures(layout: SuiteLayout, scores: Mapping[str, Sums], apart: Bools) -> dict[str, Any]:
    """Accuracies of all pairs, then best_of_* of those that are not `apart`, if any."""
    found: dict[str, Any] = {
        _ACCURACIES[name]: clustered_mean(pair.chosen > pair.rejected, layout.prompt) for name, pair in scores.items()
    }
    together = layout.select(~apart)
    if len(together.row):
        for name, pair in scores.items():
            found[f"best_of_{name}"] = clustered_mean(*best_of(together, _select(pair, ~apart)))
    return found


def _categories(layout: SuiteLayout, scores: Mapping[str, Sums], apart: Bools) -> dict[str, Any]:
    found = {}
    for name in sorted({name for name in layout.category if name}):
        where = layout.category == name
        part = layout.select(where)
        measured = _measures(part, {kind: _select(pair, where) for kind, pair in scores.items()}, apart[where])
        found[name] = {"rows": len(np.unique(part.row)), "pairs": len(part.row)}
        found[name] |= {measure: measured[measure] for measure in _OF_CATEGORIES if measure in measured}
    return found


def best_of(layout: SuiteLayout, score: Sums) -> tuple[Floats, Ints]:
    """Per row (n_rows,): 1 where every chosen answer stands above every rejected one, else 0; and its prompt.

    Of a row with one chosen and several rejected answers, whose best is shared by k of them with the chosen one among
    these, 1/k: the chance to draw it, as RewardBench 2 counts it (arXiv 2506.01937).
    """
    _, first, row = np.unique(layout.row, return_index=True, return_inverse=True)
    beaten = np.bincount(row, weights=score.rejected > score.chosen)
    level = np.bincount(row, weights=score.rejected == score.chosen)
    pairs = np.bincount(row)
    one_chosen = np.ones(len(first), dtype=bool)
    one_chosen[row[layout.chosen != layout.chosen[first][row]]] = False
    shares = np.where(one_chosen & (pairs > 1), 1 / (1 + level), level == 0)
    return np.where(beaten == 0, shares, 0.0), layout.prompt[first]


def ties_rows(layout: SuiteLayout) -> Bools:
    """The pairs (n_pairs,) of rows with ids ref:N or tied:N; only of category Ties, where the suite has that one."""
    named = np.array([isinstance(row, str) and bool(TIES_ID.fullmatch(row)) for row in layout.row_id], dtype=bool)
    of_subset = np.array([category == TIES for category in layout.category], dtype=bool)
    return named & of_subset if of_subset.any() else named


class _Question(NamedTuple):
    margin: float  # of the worst right answer above the best wrong one
    spread: float  # between the best and the worst right answer


def ties_score(layout: SuiteLayout, score: Sums) -> float | None:
    """The score of RewardBench 2's subset Ties (arXiv 2506.01937), up to 1.01; None without rows of either kind.

    0.3 each for the shares of ref rows and of tied rows whose right answers all stand above all wrong ones. Over the
    numbers that have both: 0.2 for the share whose margin between right and wrong answers of the tied row exceeds the
    spread among its right ones; 0.2 for the same with the smaller of the margins of ref and tied row; and 0.01 times
    the mean of tanh(that smaller margin / spread - 1), where a spread of 0 counts as 0.
    """
    found: dict[str, dict[str, _Question]] = {"ref": {}, "tied": {}}
    for row_id in dict.fromkeys(layout.row_id):
        match = TIES_ID.fullmatch(row_id)
        assert match is not None  # ties_rows has chosen them
        where = layout.row_id == row_id
        right, wrong = score.chosen[where], score.rejected[where]
        found[match[1]][match[2]] = _Question(float(right.min() - wrong.max()), float(right.max() - right.min()))
    both = [(found["ref"][number], tied) for number, tied in found["tied"].items() if number in found["ref"]]
    if not both:
        return None
    smaller = [min(ref.margin, tied.margin) for ref, tied in both]
    return (
        0.3 * _share([question.margin > 0 for question in found["ref"].values()])
        + 0.3 * _share([question.margin > 0 for question in found["tied"].values()])
        + 0.2 * _share([tied.margin > tied.spread for _, tied in both])
        + 0.2 * _share([margin > tied.spread for margin, (_, tied) in zip(smaller, both, strict=True)])
        + 0.01
        * _share(
            [
                math.tanh(margin / tied.spread - 1) if tied.spread else 0.0
                for margin, (_, tied) in zip(smaller, both, strict=True)
            ]
        )
    )


def _share(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
