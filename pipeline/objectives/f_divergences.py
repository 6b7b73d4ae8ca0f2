"""The implicit reward when the KL term of preference optimisation is another f-divergence (Wang et al. 2309.16240).

The reward becomes beta * f'(pi_theta / pi_ref) plus a constant of the prompt, which only cancels in a difference: so
these belong to objectives of the reward margin alone.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]

# exp of a log-ratio of 5,000 nats is no float. Beyond e^30 the exponential goes on as its tangent: finite, still
# growing, and small enough (1e13) that a squared gradient norm in float32 is finite too.
TANGENT_FROM = 30.0


def implicit_score(log_ratio: Tensor, divergence: Divergence, divergence_alpha: float) -> Tensor:
    """f'(exp(log_ratio)), dimensionless, shape of `log_ratio`; the implicit reward is beta times this.

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
