"""The numbers of evaluate.json as functions of arrays; no engine, no files."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


class PairValues(NamedTuple):
    """Per pair (n_pairs,): summed log-probs in nats under policy and reference, and tokens of the chosen response."""

    chosen: Floats
    rejected: Floats
    ref_chosen: Floats
    ref_rejected: Floats
    chosen_tokens: npt.NDArray[np.int64]

    def select(self, where: npt.NDArray[np.bool_]) -> "PairValues":
        return PairValues(**{name: column[where] for name, column in self._asdict().items()})


def pair_metrics(pairs: PairValues, *, beta: float) -> dict[str, float]:
    """Means over pairs, under the names of the training history. beta: implicit reward per nat of log-ratio.

    A tie (equal rewards) counts as wrong; dcr is the share of pairs whose chosen response has a negative reward.
    """
    chosen, rejected = beta * (pairs.chosen - pairs.ref_chosen), beta * (pairs.rejected - pairs.ref_rejected)
    return {
        "rewards/accuracies": _mean(chosen > rejected),
        "rewards/margins": _mean(chosen - rejected),
        "rewards/chosen": _mean(chosen),
        "rewards/rejected": _mean(rejected),
        **_plain_metrics(pairs.chosen, pairs.rejected, pairs.chosen_tokens),
        "dcr": _mean(chosen < 0),
        "in_distribution_logp": _mean(np.logaddexp(pairs.chosen, pairs.rejected)),
    }


def reference_metrics(pairs: PairValues) -> dict[str, float]:
    """What the reference itself scores on the same pairs."""
    return _plain_metrics(pairs.ref_chosen, pairs.ref_rejected, pairs.chosen_tokens)


def category_metrics(pairs: PairValues, categories: Sequence[str | None], *, beta: float) -> dict[str, dict[str, Any]]:
    """The main metrics of each category, by name; pairs without a category are left out."""
    names = np.array([name or "" for name in categories], dtype=object)
    found = {}
    for name in sorted(set(names) - {""}):
        where = names == name
        metrics = pair_metrics(pairs.select(where), beta=beta)
        found[name] = {"pairs": int(where.sum())} | {
            key: metrics[key] for key in ("rewards/accuracies", "rewards/margins", "dcr")
        }
    return found


def mean_over_prompts(values: Floats) -> tuple[float, float | None]:
    """Mean over all samples and its standard error, clustered by prompt. values: (n_prompts, samples_per_prompt).

    Samples of one prompt are alike, so the prompts are what was drawn independently; None where there is only one.
    """
    by_prompt = values.mean(axis=1)
    error = float(by_prompt.std(ddof=1) / np.sqrt(len(by_prompt))) if len(by_prompt) > 1 else None
    return float(by_prompt.mean()), error


def _plain_metrics(chosen: Floats, rejected: Floats, chosen_tokens: npt.NDArray[np.int64]) -> dict[str, float]:
    return {
        "logps/accuracies": _mean(chosen > rejected),
        "logps/chosen": _mean(chosen),
        "logps/rejected": _mean(rejected),
        # Nats per token over all chosen tokens, as language-model losses are given.
        "nll/chosen": float(-chosen.sum() / chosen_tokens.sum()),
    }


def _mean(values: npt.NDArray[Any]) -> float:
    return float(np.mean(values, dtype=np.float64))
