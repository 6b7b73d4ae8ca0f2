"""Objectives that judge the chosen and the rejected reward each by itself, so that more than the difference counts.

Notation as in by_name.py: a = log pi_theta - log pi_ref, r = beta * a. All return (B,).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.objectives.pair import PairLogps


def sppo(pair: PairLogps, *, beta: float) -> Tensor:
    """(a_w - 1/(2 beta))^2 + (a_l + 1/(2 beta))^2, Wu et al. 2024 (SPPO, arXiv 2405.00675) with certain labels.

    beta is 1/eta of the paper; win probabilities are 1 and 0, as in TRL's sppo_hard. Returns (B,), nats squared.
    """
    target = 1 / (2 * beta)
    return (pair.chosen_log_ratio - target).square() + (pair.rejected_log_ratio + target).square()


def nca_pair(pair: PairLogps, *, beta: float) -> Tensor:
    """-log sigmoid(r_w) - (log sigmoid(-r_w) + log sigmoid(-r_l)) / 2, Chen et al. 2024 (NCA, arXiv 2402.05369)."""
    chosen, rejected = beta * pair.chosen_log_ratio, beta * pair.rejected_log_ratio
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def bco_pair(pair: PairLogps, *, beta: float, shift: float = 0.0) -> Tensor:
    """-log sigmoid(r_w - shift) - log sigmoid(shift - r_l), Jung et al. 2024 (BCO, arXiv 2404.04656).

    The paper's shift is a running mean of all rewards so far; a pure function of the batch has none, so it is a
    constant here, in reward units, and 0 is what TRL 1.16 has. Returns (B,).
    """
    chosen, rejected = beta * pair.chosen_log_ratio, beta * pair.rejected_log_ratio
    return -F.logsigmoid(chosen - shift) - F.logsigmoid(shift - rejected)


def apo_zero(pair: PairLogps, *, beta: float) -> Tensor:
    """1 - sigmoid(r_w) + sigmoid(r_l), D'Oosterlinck et al. 2024 (APO, arXiv 2408.06266) eq. 7. Returns (B,)."""
    # 1 - sigmoid(x) = sigmoid(-x), which keeps its digits where sigmoid(x) is nearly 1.
    return torch.sigmoid(-beta * pair.chosen_log_ratio) + torch.sigmoid(beta * pair.rejected_log_ratio)


def apo_down(pair: PairLogps, *, beta: float) -> Tensor:
    """sigmoid(r_w) + 1 - sigmoid(r_w - r_l), APO (arXiv 2408.06266) eq. 8: both fall, the rejected one faster."""
    chosen, rejected = beta * pair.chosen_log_ratio, beta * pair.rejected_log_ratio
    return torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen)
