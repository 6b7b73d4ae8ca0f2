"""Which of a prompt's scored answers become pairs of chosen and rejected."""

import math
from collections.abc import Sequence

import numpy as np

from pipeline.params.sampling import PairRule


def choose_pairs(
    scores: Sequence[float], texts: Sequence[str], *, rule: PairRule, min_gap: float, seed: int
) -> list[tuple[int, int]]:
    """(chosen, rejected) as indices into one prompt's answers, whose scores differ by more than `min_gap`.

    scores, texts: (n answers,), finite. Equal texts count once, at the first. max_min: the best against the worst, as
    BPO (arXiv 2506.03557) pairs 8 answers; best_vs_random: the best against one of those far enough below it, drawn
    with `seed`; all: every two, in the order of their indices. Of equal scores the first counts. Raises ValueError for
    scores that are not finite or not as many as the texts.
    """
    if len(scores) != len(texts) or not all(map(math.isfinite, scores)):
        raise ValueError(f"expected a finite score for each of {len(texts)} texts, found {list(scores)}")
    distinct = sorted({text: at for at, text in reversed([*enumerate(texts)])}.values())
    if len(distinct) < 2:
        return []
    if rule == "all":
        return [(i, j) for i in distinct for j in distinct if scores[i] - scores[j] > min_gap]
    best = max(distinct, key=lambda at: scores[at])
    below = [at for at in distinct if scores[best] - scores[at] > min_gap]
    if not below:
        return []
    if rule == "max_min":
        return [(best, min(below, key=lambda at: scores[at]))]
    return [(best, below[int(np.random.default_rng(seed).integers(len(below)))])]
