"""Loss landscapes over the probabilities of one chosen and one rejected response, after the BDPO paper's figures 1-2.

A prompt has a chosen response w, a rejected one l, and others, which share what is left: pi_w + pi_l <= 1. The losses
are pipeline/objectives's, in float64, and so are their gradients.
"""

import math
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from pipeline.objectives import OBJECTIVES, PairLogps
from pipeline.params import AnyVariant
from studies.pages.settings import Section

GONE = -5000.0  # nats: log pi_l of a rejected response driven out; the objectives are proven finite down to here


class Reference(Section):
    chosen: float
    rejected: float


class LandscapeParams(Section):
    reference: Reference
    grid: int = Field(ge=10)
    objectives: dict[str, AnyVariant]


@dataclass(frozen=True)
class Landscape:
    """What one objective's loss over the simplex comes to. Probabilities, losses, and shares of the simplex's area."""

    start: float  # loss at the reference
    best: float  # loss at pi_w = 1, pi_l = 0
    abandoned: float  # loss where pi_w is a tenth of the reference's and pi_l = 0
    minimum: tuple[float, float]  # where on the grid the loss is smallest
    lowest_chosen: float  # the infimum of pi_w over all points with a smaller loss than the start's; 0: none
    better_with_less: float  # share: smaller loss than the start's although pi_w is below the reference's
    chosen_falls: float  # share: gradient descent on the logits of a table lowers pi_w
    others_rise: float  # share: ... raises what is neither w nor l
    rejected_slope: tuple[float, float]  # d loss / d pi_l at pi_l = 1e-4 and 1e-8, pi_w as the reference's


def loss(variant: AnyVariant, reference: Reference, log_w: Tensor, log_l: Tensor) -> Tensor:
    """Loss at the log-probs log_w, log_l, (N,) float64; every response is one token long."""
    ref_w, ref_l = (torch.full_like(log_w, math.log(p)) for p in (reference.chosen, reference.rejected))
    one = torch.ones_like(log_w)
    return OBJECTIVES[variant.objective](PairLogps(log_w, log_l, ref_w, ref_l, one, one), **variant.hyperparameters())


def loss_at(variant: AnyVariant, reference: Reference, log_w: float, log_l: float) -> float:
    point = (torch.tensor([x], dtype=torch.float64) for x in (log_w, log_l))
    return loss(variant, reference, *point).item()


def flow(variant: AnyVariant, reference: Reference, w: Tensor, l: Tensor) -> tuple[Tensor, Tensor]:  # noqa: E741
    """Velocity of (pi_w, pi_l), (N,) each, under gradient flow on the three logits of a table (w, l, others)."""
    log_w, log_l = w.log().requires_grad_(), l.log().requires_grad_()
    total = loss(variant, reference, log_w, log_l).sum()
    by_w, by_l = torch.autograd.grad(total, [log_w, log_l])
    policy = torch.stack([w, l, 1 - w - l])
    # d log pi_i / d theta_k = [i = k] - pi_k
    push = policy * (by_w + by_l) - torch.stack([by_w, by_l, torch.zeros_like(w)])
    velocity = policy * (push - (policy * push).sum(dim=0))
    return velocity[0], velocity[1]


def simplex(cells: int) -> tuple[Tensor, Tensor]:
    """Centres of the cells of a square grid that lie inside pi_w + pi_l < 1, each (N,)."""
    centres = (torch.arange(cells, dtype=torch.float64) + 0.5) / cells
    w, l = torch.meshgrid(centres, centres, indexing="ij")  # noqa: E741
    inside = w + l < 1
    return w[inside], l[inside]


def lowest_chosen(variant: AnyVariant, reference: Reference) -> float:
    """The infimum of pi_w over all points whose loss is below the start's, by bisection of log pi_w at pi_l = 0.

    0 where it moves with what stands for pi_l = 0: then there is none, and a smaller pi_l pays for any fall of pi_w.
    """
    start = loss_at(variant, reference, math.log(reference.chosen), math.log(reference.rejected))
    found = []
    for log_l in (GONE / 2, GONE):
        low, high = GONE, 0.0
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (low, middle) if loss_at(variant, reference, middle, log_l) < start else (middle, high)
        found.append(high)
    return math.exp(found[1]) if math.isclose(*found, abs_tol=1e-6) else 0.0


def survey(variant: AnyVariant, reference: Reference, cells: int) -> Landscape:
    w, l = simplex(cells)  # noqa: E741
    losses = loss(variant, reference, w.log(), l.log())
    ref_w, ref_l = math.log(reference.chosen), math.log(reference.rejected)
    start = loss_at(variant, reference, ref_w, ref_l)
    speed_w, speed_l = flow(variant, reference, w, l)
    still = 1e-15  # rounding of a velocity that is 0
    least = losses.argmin()
    slopes = []
    for exponent in (4, 8):
        log_l = torch.tensor([-exponent * math.log(10)], dtype=torch.float64, requires_grad=True)
        (by_log_l,) = torch.autograd.grad(
            loss(variant, reference, torch.full_like(log_l, ref_w).detach(), log_l).sum(), log_l
        )
        slopes.append(by_log_l.item() * 10.0**exponent)
    return Landscape(
        start=start,
        best=loss_at(variant, reference, 0.0, GONE),
        abandoned=loss_at(variant, reference, math.log(reference.chosen / 10), GONE),
        minimum=(w[least].item(), l[least].item()),
        lowest_chosen=lowest_chosen(variant, reference),
        better_with_less=_share((losses < start) & (w < reference.chosen)),
        chosen_falls=_share(speed_w < -still),
        others_rise=_share(-speed_w - speed_l > still),
        rejected_slope=(slopes[0], slopes[1]),
    )


def _share(points: Tensor) -> float:
    return points.double().mean().item()
