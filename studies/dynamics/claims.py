"""The papers' claims about learning dynamics, each judged by the run's own figures.

A claim holds if its difference has the claimed sign and its 95 % interval over prompts leaves out zero.
"""

import numpy as np
import polars as pl

from studies.pages.intervals import Mean, mean_interval
from studies.pages.markdown import Claim
from studies.pages.runs import REFERENCE, Cells

NEAR, FAR = ("bdpo", "dpop"), ("dpo", "dpo_nll")
SPLITS = {"train": "training pairs", "test": "held-out pairs"}


class Divergences:
    """divergence.parquet: KL(policy || reference) by prompt, nats an answer."""

    def __init__(self, table: pl.DataFrame, split: str) -> None:
        self.table = table.filter(pl.col("split") == split)

    def by_prompt(self, variant: str) -> np.ndarray:
        """Mean over seeds, one value a prompt, prompts in the order of their keys, (n_prompts,)."""
        own = self.table.filter(pl.col("variant") == variant)
        return own.group_by("prompt_key").agg(pl.col("kl").mean()).sort("prompt_key")["kl"].to_numpy()

    def mean(self, variant: str) -> Mean:
        return mean_interval(self.by_prompt(variant))

    def difference(self, one: str, other: str) -> Mean:
        """The mean of `one` less `other`, prompt by prompt."""
        return mean_interval(self.by_prompt(one) - self.by_prompt(other))


def judge(cells: Cells, divergences: Divergences, split: str) -> list[Claim]:
    """All claims on one split ("train" or "test")."""
    where = SPLITS[split]
    return [
        _dpo_lowers_both(cells, where),
        *(_stays_nearer(divergences, near, far, where) for near in NEAR for far in FAR),
        _bdpo_lowers_nll(cells, where),
        _bpo_raises_chosen(cells, where),
    ]


def _dpo_lowers_both(cells: Cells, where: str) -> Claim:
    chosen, rejected = (cells.over_prompts("dpo", f"{side}_ratio") for side in ("chosen", "rejected"))
    return Claim(
        f"DPO lowers both chosen and rejected ({where})",
        chosen.high < 0 and rejected.high < 0,
        f"change in log-prob, nats a response: chosen {chosen.show(1)}, rejected {rejected.show(1)}",
    )


def _stays_nearer(divergences: Divergences, near: str, far: str, where: str) -> Claim:
    difference = divergences.difference(near, far)
    return Claim(
        f"{near} stays nearer to the reference than {far} (prompts of {where})",
        difference.high < 0,
        f"KL {divergences.mean(near).value:.2f} against {divergences.mean(far).value:.2f} nats an answer, "
        f"difference {difference.show()}",
    )


def _bdpo_lowers_nll(cells: Cells, where: str) -> Claim:
    change = cells.over_prompts("bdpo", "chosen_ratio")
    return Claim(
        f"BDPO lowers the NLL of chosen responses without an NLL term ({where})",
        change.low > 0,
        f"{nll(cells, REFERENCE):.3f} to {nll(cells, 'bdpo'):.3f} nats a token; chosen log-prob changes by "
        f"{change.show(1)} nats a response",
    )


def _bpo_raises_chosen(cells: Cells, where: str) -> Claim:
    change = cells.over_prompts("bpo", "chosen_ratio")
    dcr, dpo = (cells.over_prompts(name, "dcr").value for name in ("bpo", "dpo"))
    return Claim(
        f"BPO raises the chosen log-prob, and fewer chosen responses fall than under DPO ({where})",
        change.low > 0 and dcr < dpo,
        f"chosen log-prob changes by {change.show(1)} nats a response; dcr {dcr:.3f} against {dpo:.3f}",
    )


def nll(cells: Cells, variant: str) -> float:
    """Nats per token over all chosen tokens; for the reference of the reference cache."""
    column = "ref_chosen" if variant == REFERENCE else "chosen"
    tokens, _ = cells.by_pair(variant, "chosen_tokens")
    values, _ = cells.by_pair(variant, column)
    return float(-values.sum() / tokens.sum())
