"""Objectives of the reward margin r_w - r_l: only the difference counts, unless a term of its own says otherwise.

Notation as in by_name.py: a = log pi_theta - log pi_ref, r = beta * a, or beta * f' where a `divergence`
is offered (`implicit_score`). Hyper-parameters and ranges: pipeline/params/objectives.py. All return (B,).
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.objectives.pair import OverTokens, PairLogps

Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]

# exp of a log-ratio of 5,000 nats is no float. Beyond e^30 the exponential goes on as its tangent: finite, still
# growing, and small enough (1e13) that a squared gradient norm in float32 is finite too.
TANGENT_FROM = 30.0


def implicit_score(log_ratio: Tensor, divergence: Divergence, divergence_alpha: float) -> Tensor:
    """f'(exp(log_ratio)), dimensionless, shape of `log_ratio`; the implicit reward is beta times this.

    Where the KL term of preference optimisation is another f-divergence, the reward is this plus a constant of the
    prompt, which only cancels in a difference (Wang et al. 2023, arXiv 2309.16240).

    reverse_kl: log u, which is DPO's. forward_kl: 1 - 1/u. js: log(2u / (1 + u)). alpha: (u^(alpha-1) - 1)/(alpha-1),
    of which alpha 1 is reverse_kl and alpha 0 is forward_kl. `divergence_alpha` is read for "alpha" alone.
    """
    if divergence == "reverse_kl":
        return log_ratio
    if divergence == "js":
        return math.log(2) + F.logsigmoid(log_ratio)
    power = -1.0 if divergence == "forward_kl" else divergence_alpha - 1.0
    if abs(power) < 1e-6:  # the limit; the quotient would be rounding noise in float32
        return log_ratio
    return _expm1_with_tangent(power * log_ratio) / power


def _expm1_with_tangent(x: Tensor) -> Tensor:
    return torch.expm1(x.clamp(max=TANGENT_FROM)) + math.exp(TANGENT_FROM) * torch.relu(x - TANGENT_FROM)


def _reward_margin(pair: PairLogps, beta: float, divergence: Divergence, divergence_alpha: float) -> Tensor:
    chosen = implicit_score(pair.chosen_log_ratio, divergence, divergence_alpha)
    return beta * (chosen - implicit_score(pair.rejected_log_ratio, divergence, divergence_alpha))


def smoothed_logistic(margin: Tensor, label_smoothing: float) -> Tensor:
    """-(1 - e) log sigmoid(margin) - e log sigmoid(-margin); e: assumed probability that a label is flipped."""
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


def dpo(
    pair: PairLogps,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    divergence: Divergence = "reverse_kl",
    divergence_alpha: float = 0.5,
) -> Tensor:
    """-log sigmoid(r_w - r_l), Rafailov et al. 2023 (arXiv 2305.18290) eq. 7; per pair, unreduced.

    pair: see PairLogps. beta: inverse temperature of the implicit reward. label_smoothing: assumed probability that a
    label is flipped (conservative DPO, Mitchell 2023). divergence: f-DPO (arXiv 2309.16240). Returns (B,).
    """
    return smoothed_logistic(_reward_margin(pair, beta, divergence, divergence_alpha), label_smoothing)


def dpo_nll(
    pair: PairLogps, *, beta: float, weight: float = 1.0, over_tokens: OverTokens = "sum", label_smoothing: float = 0.0
) -> Tensor:
    """DPO + weight * NLL of the chosen response (Pang et al. 2024, arXiv 2404.19733; TRL's RPO).

    over_tokens: "sum" is nats a response, as the BDPO paper has it; "mean" is nats a token. Returns (B,).
    """
    return dpo(pair, beta=beta, label_smoothing=label_smoothing) + weight * pair.chosen_nll(over_tokens)


def dpop(pair: PairLogps, *, beta: float, penalty: float = 50.0) -> Tensor:
    """-log sigmoid(beta * (a_w - a_l - penalty * max(0, -a_w))), DPO-Positive (Pal et al. 2024, arXiv 2402.13228)."""
    fall = torch.relu(-pair.chosen_log_ratio)
    return -F.logsigmoid(beta * (pair.chosen_log_ratio - pair.rejected_log_ratio - penalty * fall))


def minor_dpo(pair: PairLogps, *, beta: float) -> Tensor:
    """-log sigmoid(beta * (a_w - max(0, a_l))), MinorDPO (Xie et al. 2024, arXiv 2408.09834).

    The rejected response is pushed down only while it is more likely than under the reference. Returns (B,).
    """
    return -F.logsigmoid(beta * (pair.chosen_log_ratio - torch.relu(pair.rejected_log_ratio)))


def robust(
    pair: PairLogps,
    *,
    beta: float,
    label_smoothing: float = 0.1,
    divergence: Divergence = "reverse_kl",
    divergence_alpha: float = 0.5,
) -> Tensor:
    """DPO made unbiased under labels flipped with probability e (Chowdhury et al. 2024, arXiv 2403.00409).

    (-(1 - e) log sigmoid(m) + e log sigmoid(-m)) / (1 - 2e), m = r_w - r_l; unbounded below. Returns (B,).
    """
    margin = _reward_margin(pair, beta, divergence, divergence_alpha)
    clean, flipped = -F.logsigmoid(margin), -F.logsigmoid(-margin)
    return ((1 - label_smoothing) * clean - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def hinge(
    pair: PairLogps, *, beta: float, divergence: Divergence = "reverse_kl", divergence_alpha: float = 0.5
) -> Tensor:
    """max(0, 1 - (r_w - r_l)): SLiC's hinge on DPO's margin (Liu et al. 2024, RSO, arXiv 2309.06657). Returns (B,)."""
    return torch.relu(1 - _reward_margin(pair, beta, divergence, divergence_alpha))


def ipo(
    pair: PairLogps,
    *,
    beta: float,
    over_tokens: OverTokens = "sum",
    divergence: Divergence = "reverse_kl",
    divergence_alpha: float = 0.5,
) -> Tensor:
    """(a_w - a_l - 1/(2 beta))^2, Azar et al. 2023 (arXiv 2310.12036) eq. 17, whose tau is `beta`.

    over_tokens: "sum" takes a as the equation does, nats a response; "mean" divides each by its response's tokens, as
    TRL does. Returns (B,), nats squared.
    """
    chosen = implicit_score(pair.chosen_log_ratio, divergence, divergence_alpha)
    rejected = implicit_score(pair.rejected_log_ratio, divergence, divergence_alpha)
    if over_tokens == "mean":
        chosen, rejected = chosen / pair.chosen_lengths, rejected / pair.rejected_lengths
    return (chosen - rejected - 1 / (2 * beta)).square()


def exo_pair(
    pair: PairLogps,
    *,
    beta: float,
    label_smoothing: float = 1e-3,
    divergence: Divergence = "reverse_kl",
    divergence_alpha: float = 0.5,
) -> Tensor:
    """KL from the policy's choice between the two to the label's (Ji et al. 2024, EXO, arXiv 2402.00856, eq. 16).

    q = sigmoid(r_w - r_l), p = 1 - label_smoothing: q log(q/p) + (1-q) log((1-q)/(1-p)). Returns (B,).
    """
    margin = _reward_margin(pair, beta, divergence, divergence_alpha)
    chosen = torch.sigmoid(margin) * (F.logsigmoid(margin) - math.log1p(-label_smoothing))
    return chosen + torch.sigmoid(-margin) * (F.logsigmoid(-margin) - math.log(label_smoothing))


def discopop(
    pair: PairLogps,
    *,
    beta: float,
    tau: float = 0.05,
    divergence: Divergence = "reverse_kl",
    divergence_alpha: float = 0.5,
) -> Tensor:
    """Log-ratio-modulated loss, found by search (Lu et al. 2024, DiscoPOP, arXiv 2406.08414, eq. 5).

    With m = r_w - r_l and s = sigmoid(m / tau): (1 - s) * -log sigmoid(m) + s * exp(-m). Returns (B,).
    """
    margin = _reward_margin(pair, beta, divergence, divergence_alpha)
    logistic = torch.sigmoid(-margin / tau) * -F.logsigmoid(margin)
    # One exponent: for a margin of -5,000 exp(-m) overflows, while its product with s is 0.
    return logistic + torch.exp(F.logsigmoid(margin / tau) - margin)


def sigmoid_norm(
    pair: PairLogps, *, beta: float, divergence: Divergence = "reverse_kl", divergence_alpha: float = 0.5
) -> Tensor:
    """DPO on rewards divided by their response's tokens (TRL's sigmoid_norm; Tulu 3's length-normalised DPO)."""
    chosen = implicit_score(pair.chosen_log_ratio, divergence, divergence_alpha) / pair.chosen_lengths
    rejected = implicit_score(pair.rejected_log_ratio, divergence, divergence_alpha) / pair.rejected_lengths
    return -F.logsigmoid(beta * (chosen - rejected))


def aot(pair: PairLogps, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Alignment by optimal transport, paired (Melnyk et al. 2024, arXiv 2406.05882): DPO on sorted margins.

    log pi(y_w) - log pi(y_l) is sorted over the batch, under the policy and under the reference, and compared rank by
    rank. So it depends on the batch: entry i belongs to rank i, not to pair i, only the mean over a whole batch has a
    meaning, and the batch must be one micro-batch on one rank. Returns (B,).
    """
    policy = torch.sort(pair.chosen - pair.rejected).values
    return smoothed_logistic(beta * (policy - torch.sort(pair.ref_chosen - pair.ref_rejected).values), label_smoothing)


def aot_unpaired(pair: PairLogps, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """As `aot`, for chosen and rejected responses that don't answer each other: a_w and a_l are sorted, each alone."""
    chosen, rejected = torch.sort(pair.chosen_log_ratio).values, torch.sort(pair.rejected_log_ratio).values
    return smoothed_logistic(beta * (chosen - rejected), label_smoothing)
