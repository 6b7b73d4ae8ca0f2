"""DPO and AuxDPO on the contextual bandit, in exact expectations: labels are Bradley-Terry probabilities, not draws.

The loss is pipeline/objectives's. Both are convex in (u, delta), where u = beta theta is all of the policy that they
know, and are solved by Newton's method.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.objectives import PairLogps, auxdpo
from studies.misspecification.bandit import World, all_pairs

NULL_WEIGHT = 100.0  # any positive one gives the same policy where the labels can be fitted exactly, as they can here
CLOSEST = 1e-8  # weight of u^T F u: of policies that fit alike, the one that is closest to the reference
DAMPING = 1e-13  # for offsets common to a prompt's responses, which change nothing
NEWTON_STEPS, CONVERGED = 60, 1e-18  # of the decrease that a step promises


def fit(
    world: World, pairs: Tensor, penalty: Tensor | None = None, *, ridge: float = 0.0, offsets: bool = True
) -> tuple[Tensor, Tensor]:
    """(u, delta) of least loss: (d,) and (X, Y). DPO without offsets; AuxDPO with ||penalty @ delta||^2 and a ridge.

    penalty: (k, X Y), A or S A. ridge: of sum over responses of weights delta^2.
    """
    quadratic = _quadratic(world, penalty, ridge, offsets)
    at = torch.zeros(len(quadratic), dtype=torch.float64)
    loss_of = _losses(world, pairs)
    for _ in range(NEWTON_STEPS):
        loss, slope, curvature = loss_of(at, offsets)
        slope, curvature = slope + quadratic @ at, curvature + quadratic
        curvature.diagonal().add_(DAMPING)
        step = -torch.linalg.solve_ex(curvature, slope)[0]
        if -(slope @ step) < CONVERGED:
            break
        total, size = loss + at @ quadratic @ at / 2, 1.0
        while size > 1e-6:
            ahead = at + size * step
            if loss_of(ahead, offsets, value_only=True)[0] + ahead @ quadratic @ ahead / 2 <= total + 1e-13:
                break
            size /= 2
        at = at + size * step
    d = world.phi.shape[2]
    delta = at[d:].view_as(world.reward) if offsets else torch.zeros_like(world.reward)
    return at[:d], delta


def _quadratic(world: World, penalty: Tensor | None, ridge: float, offsets: bool) -> Tensor:
    """The Hessian of all but the loss over pairs."""
    d, n = world.phi.shape[2], world.reward.numel() if offsets else 0
    found = torch.zeros(d + n, d + n, dtype=torch.float64)
    g = world.gradients.flatten(0, 1)
    found[:d, :d] = 2 * CLOSEST * (g.T @ (world.weights.flatten()[:, None] * g))
    if offsets:
        found[d:, d:].diagonal().add_(2 * ridge * world.weights.flatten())
        if penalty is not None:
            found[d:, d:] += 2 * NULL_WEIGHT * penalty.T @ penalty
    return found


def _losses(world: World, pairs: Tensor) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """The loss over pairs, labelled both ways by their probability, as a function of (u, delta); slope and Hessian."""
    x, y, d = world.phi.shape
    starts = y * torch.arange(x)[:, None]
    first, second = ((starts + side).flatten() for side in all_pairs(y))
    phi = world.phi.flatten(0, 1)
    contrast = phi[first] - phi[second]
    share = torch.sigmoid(world.reward.flatten()[first] - world.reward.flatten()[second])
    weight = pairs.flatten()

    def of(at: Tensor, offsets: bool, value_only: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        margin = contrast @ at[:d]
        if offsets:
            margin = margin + at[d:][first] - at[d:][second]
        won, lost = _derivatives(margin), _derivatives(-margin)
        loss = (weight * (share * won[0] + (1 - share) * lost[0])).sum()
        if value_only:
            return loss, at, at
        slope = weight * (share * won[1] - (1 - share) * lost[1])
        bend = weight * (share * won[2] + (1 - share) * lost[2])
        gradient, hessian = torch.zeros_like(at), torch.zeros(len(at), len(at), dtype=torch.float64)
        gradient[:d] = slope @ contrast
        bent = bend[:, None] * contrast
        hessian[:d, :d] = contrast.T @ bent
        if offsets:
            gradient[d:].index_add_(0, first, slope).index_add_(0, second, -slope)
            cross, block = hessian[d:, :d], hessian[d:, d:]
            cross.index_add_(0, first, bent).index_add_(0, second, -bent)
            hessian[:d, d:] = cross.T
            for rows, columns in ((first, second), (second, first)):
                block.index_put_((rows, rows), bend, accumulate=True)
                block.index_put_((rows, columns), -bend, accumulate=True)
        return loss, gradient, hessian

    return of


def _derivatives(margin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """AuxDPO's loss of each pair at these margins, and its first two derivatives; the offsets are in the margin."""
    margin = margin.detach().requires_grad_()
    zero = torch.zeros_like(margin)
    pair = PairLogps(margin, zero, zero, zero, zero + 1, zero + 1)
    loss = auxdpo(pair, beta=1.0, chosen_offset=zero, rejected_offset=zero)
    (slope,) = torch.autograd.grad(loss.sum(), margin, create_graph=True)
    (bend,) = torch.autograd.grad(slope.sum(), margin)
    return loss.detach(), slope.detach(), bend
