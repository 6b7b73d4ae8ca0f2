"""KTO: responses that are desirable or not, each for itself, against a baseline from mismatched responses."""

from typing import NamedTuple

import torch
from torch import Tensor


class FeedbackLogps(NamedTuple):
    """Log-probs summed over a response's tokens, nats, float32, each (B,); the reference's carry no gradient.

    mismatched: of a response to another prompt, under this example's prompt. desirable: bool, (B,).
    """

    response: Tensor
    ref_response: Tensor
    mismatched: Tensor
    ref_mismatched: Tensor
    desirable: Tensor

    @property
    def log_ratio(self) -> Tensor:
        return self.response - self.ref_response

    @property
    def baseline(self) -> Tensor:
        """z_0, nats, (): the mean log-ratio of the mismatched responses, at least 0, without gradient."""
        return (self.mismatched - self.ref_mismatched).mean().detach().clamp(min=0)


def kto(
    feedback: FeedbackLogps, *, beta: float, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> Tensor:
    """Kahneman-Tversky optimisation (Ethayarajh et al. 2024, arXiv 2402.01306, eqs. 7 and 8).

    lambda_y - v(x, y): desirable_weight * sigmoid(beta * (z_0 - a)) for desirable responses, undesirable_weight *
    sigmoid(beta * (a - z_0)) for the others, with a the response's log-ratio. z_0 is of the batch, so the batch must be
    one micro-batch. The paper keeps desirable_weight * desirable examples within 1 to 4/3 times the other product.
    Returns (B,).
    """
    gain = beta * (feedback.log_ratio - feedback.baseline)
    return torch.where(
        feedback.desirable, desirable_weight * torch.sigmoid(-gain), undesirable_weight * torch.sigmoid(gain)
    )
