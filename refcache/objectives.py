"""The preference losses as plain functions of sequence log-probs (docs/objectives.md is their table).

    from refcache import objectives

    loss = objectives.bdpo(objectives.pair_logps(rewards), beta=0.1, mixture=0.5)  # (B,), one loss a pair

Each takes a PairLogps of tensors (B,) and returns (B,); `OBJECTIVES` has all of them by name.
"""

import polars as pl
import torch

from pipeline import objectives
from pipeline.objectives import *  # noqa: F403
from pipeline.objectives import PairLogps

__all__ = [*objectives.__all__, "pair_logps"]


def pair_logps(frame: pl.DataFrame, dtype: torch.dtype = torch.float32) -> PairLogps:
    """The log-probs of a frame that `implicit_rewards` gave, as the objectives take them; (len(frame),), on CPU."""
    names = ("chosen_policy_logp", "rejected_policy_logp", "chosen_logp", "rejected_logp")
    lengths = ("chosen_tokens", "rejected_tokens")
    columns = [frame[name].to_numpy() for name in (*names, *lengths)]
    return PairLogps(*(torch.tensor(column, dtype=dtype) for column in columns))
