"""Preference objectives as pure functions of sequence log-probs.

Notation, after the papers: w the chosen response, l the rejected one, r = beta * (log pi_theta - log pi_ref) the
implicit reward. Hyper-parameters and their ranges are declared in pipeline/objective_params.py.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Objective = Callable[..., Tensor]


class PairLogps(NamedTuple):
    """Response log-probs summed over tokens, nats, float32, each (B,); lengths in tokens, (B,).

    The reference's are data and carry no gradient.
    """

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor

    @property
    def chosen_log_ratio(self) -> Tensor:
        return self.chosen - self.ref_chosen

    @property
    def rejected_log_ratio(self) -> Tensor:
        return self.rejected - self.ref_rejected


def dpo(pair: PairLogps, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """-log sigmoid(r_w - r_l), Rafailov et al. 2023 (arXiv 2305.18290) eq. 7; per pair, unreduced.

    pair: see PairLogps. beta: inverse temperature of the implicit reward, > 0. label_smoothing: assumed probability
    that a label is flipped, in [0, 0.5) (conservative DPO, Mitchell 2023). Returns (B,).
    """
    margin = beta * (pair.chosen_log_ratio - pair.rejected_log_ratio)
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


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


OBJECTIVES: dict[str, Objective] = {"dpo": dpo, "bdpo": bdpo}
