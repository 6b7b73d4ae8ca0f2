"""Every preference objective by name, each a pure function of sequence log-probs; docs/objectives.md is their table.

Notation, after the papers: w the chosen response, l the rejected one, a = log pi_theta - log pi_ref, r = beta * a the
implicit reward. Here are the objectives this project was made for and the dict; their baselines are in margin.py,
reward.py and reference_free.py. Hyper-parameters and their ranges are declared in pipeline/params/objectives.py. An
objective returns one loss per pair, and pairs don't influence each other (`aot` excepted, which says so), so
micro-batches, ranks and several pairs of one prompt change nothing.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.objectives.margin import (
    aot,
    aot_unpaired,
    discopop,
    dpo,
    dpo_nll,
    dpop,
    exo_pair,
    hinge,
    ipo,
    minor_dpo,
    robust,
    sigmoid_norm,
)
from pipeline.objectives.pair import PairLogps
from pipeline.objectives.reference_free import cpo, orpo, sft, simpo, slic
from pipeline.objectives.reward import apo_down, apo_zero, bco_pair, nca_pair, sppo

__all__ = ["OBJECTIVES", "Objective", "PairLogps", "auxdpo", "bdpo", "bpo", "dpo", "weighted_sum"]

Objective = Callable[..., Tensor]


def bdpo(pair: PairLogps, *, beta: float, mixture: float = 0.5) -> Tensor:
    """Bounded DPO (arXiv 2506.12725): DPO with mixture*pi_theta(y_l) + (1-mixture)*pi_ref(y_l) for pi_theta(y_l).

    The rejected term is then bounded below by log(1 - mixture), so the loss can't be bought by driving the rejected
    response to zero. mixture: weight of the policy, in (0, 1); towards 1 it becomes DPO. Returns (B,).
    """
    if not 0.0 < mixture < 1.0:
        raise ValueError(f"bdpo: mixture must lie strictly between 0 and 1, got {mixture}; 1 is plain DPO")
    # log(mixture * pi_theta/pi_ref + 1 - mixture): a ratio, so that log-probs of -5,000 lose no digits.
    bounded = torch.logaddexp(
        pair.rejected_log_ratio + math.log(mixture),
        torch.full_like(pair.rejected_log_ratio, math.log1p(-mixture)),
    )
    return -F.logsigmoid(beta * (pair.chosen_log_ratio - bounded))


def bpo(pair: PairLogps, *, beta: float, alpha: float = 1.0, link: Literal["logistic", "hinge"] = "logistic") -> Tensor:
    """Balanced preference optimisation (arXiv 2506.03557): a link of min(r_w, -alpha * r_l).

    Only the response whose term is smaller is moved. alpha: the gap adaptor, in (0, 1]: where both terms are equal the
    rejected reward has fallen 1/alpha times as far as the chosen one has risen. link: -log sigmoid(m), or
    max(0, 1 - m). Returns (B,).
    """
    chosen, rejected = beta * pair.chosen_log_ratio, -alpha * beta * pair.rejected_log_ratio
    # At a tie, which is where every policy starts, torch.minimum would move both by half; raise the chosen one.
    margin = torch.where(chosen <= rejected, chosen, rejected)
    return torch.relu(1 - margin) if link == "hinge" else -F.logsigmoid(margin)


def auxdpo(pair: PairLogps, *, beta: float, chosen_offset: Tensor, rejected_offset: Tensor) -> Tensor:
    """-log sigmoid(r_w - r_l + delta_w - delta_l): AuxDPO's empirical loss (arXiv 2510.20413) with given offsets.

    chosen_offset, rejected_offset: delta of each response, in reward units (beta is not on them), (B,); they may
    carry gradient. Their constraint is no part of this loss; without it they would fit the labels alone, so this is
    not in OBJECTIVES. Returns (B,).
    """
    margin = beta * (pair.chosen_log_ratio - pair.rejected_log_ratio)
    return -F.logsigmoid(margin + chosen_offset - rejected_offset)


def weighted_sum(pair: PairLogps, *, terms: Sequence[Mapping[str, Any]]) -> Tensor:
    """sum_i weight_i * objective_i; each term: {"objective", "weight", "hyperparameters"}. Returns (B,)."""
    losses = [term["weight"] * OBJECTIVES[term["objective"]](pair, **term["hyperparameters"]) for term in terms]
    return torch.stack(losses).sum(dim=0)


OBJECTIVES: dict[str, Objective] = {
    "dpo": dpo,
    "bdpo": bdpo,
    "bpo": bpo,
    "dpo_nll": dpo_nll,
    "dpop": dpop,
    "minor_dpo": minor_dpo,
    "robust": robust,
    "hinge": hinge,
    "ipo": ipo,
    "exo_pair": exo_pair,
    "discopop": discopop,
    "sigmoid_norm": sigmoid_norm,
    "aot": aot,
    "aot_unpaired": aot_unpaired,
    "sppo": sppo,
    "nca_pair": nca_pair,
    "bco_pair": bco_pair,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "sft": sft,
    "slic": slic,
    "cpo": cpo,
    "simpo": simpo,
    "orpo": orpo,
    "weighted_sum": weighted_sum,
}
