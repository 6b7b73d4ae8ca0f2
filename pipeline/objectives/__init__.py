"""Preference losses as pure functions of sequence log-probs; docs/objectives.md is their table."""

from pipeline.objectives.by_name import OBJECTIVES, Objective, auxdpo, bdpo, bpo, dpo, weighted_sum
from pipeline.objectives.feedback import FeedbackLogps, kto
from pipeline.objectives.pair import PairLogps

__all__ = [
    "OBJECTIVES",
    "FeedbackLogps",
    "Objective",
    "PairLogps",
    "auxdpo",
    "bdpo",
    "bpo",
    "dpo",
    "kto",
    "weighted_sum",
]
