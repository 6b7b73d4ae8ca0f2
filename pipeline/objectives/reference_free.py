"""Objectives of the policy's own log-probs; the reference only serves the reward metrics. All return (B,)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.objectives.margin import smoothed_logistic
from pipeline.objectives.pair import OverTokens, PairLogps


def sft(pair: PairLogps, *, over_tokens: OverTokens = "sum") -> Tensor:
    """-log pi_theta(y_w): supervised fine-tuning on the chosen response, mostly a term of `weighted_sum`.

    over_tokens: "sum" is nats a response; "mean" is nats a token of that response. Returns (B,).
    """
    return pair.chosen_nll(over_tokens)


def slic(pair: PairLogps, *, margin: float = 1.0, weight: float = 0.0, over_tokens: OverTokens = "sum") -> Tensor:
    """max(0, margin - log pi(y_w) + log pi(y_l)) + weight * NLL, Zhao et al. 2023 (SLiC-HF, arXiv 2305.10425).

    margin: the paper's delta, nats. The regulariser's target is the chosen response. Returns (B,), nats.
    """
    return torch.relu(margin - pair.chosen + pair.rejected) + weight * pair.chosen_nll(over_tokens)


def cpo(
    pair: PairLogps, *, beta: float, weight: float = 1.0, over_tokens: OverTokens = "sum", label_smoothing: float = 0.0
) -> Tensor:
    """-log sigmoid(beta * (log pi(y_w) - log pi(y_l))) + weight * NLL, Xu et al. 2024 (CPO, arXiv 2401.08417)."""
    contrast = smoothed_logistic(beta * (pair.chosen - pair.rejected), label_smoothing)
    return contrast + weight * pair.chosen_nll(over_tokens)


def simpo(pair: PairLogps, *, beta: float = 2.0, gamma: float = 1.0, label_smoothing: float = 0.0) -> Tensor:
    """-log sigmoid(beta * (log pi(y_w)/|y_w| - log pi(y_l)/|y_l|) - gamma), Meng et al. 2024 (SimPO, 2405.14734).

    beta: reward per nat a token; gamma: target margin, in reward units (not divided by beta). Returns (B,).
    """
    margin = beta * (pair.chosen / pair.chosen_lengths - pair.rejected / pair.rejected_lengths) - gamma
    return smoothed_logistic(margin, label_smoothing)


def orpo(pair: PairLogps, *, weight: float = 0.1) -> Tensor:
    """NLL a token - weight * log sigmoid(log odds(y_w) - log odds(y_l)), Hong et al. 2024 (ORPO, arXiv 2403.07691).

    odds = p / (1 - p) of the length-normalised probability p = exp(log pi / tokens). Returns (B,), nats a token.
    """
    log_odds = _log_odds(pair.chosen / pair.chosen_lengths) - _log_odds(pair.rejected / pair.rejected_lengths)
    return pair.chosen_nll("mean") - weight * F.logsigmoid(log_odds)


def _log_odds(logp: Tensor) -> Tensor:
    """log p - log(1 - p) from log p <= 0; a p that rounds to 1 counts as 1 less one rounding error."""
    logp = logp.clamp(max=-torch.finfo(logp.dtype).eps)
    return logp - torch.log(-torch.expm1(logp))
