"""The three-response bandit of arXiv 2510.20413: DPO's answer depends on which pairs were drawn, AuxDPO's does not.

Policy proportional to [e^t, e^-t, 1], reference t = 0, rewards [1, 2, 0]; the KL-regularised optimum is
t* = -1 / (2 beta) + O(1 / beta^2). Labels are the exact Bradley-Terry probabilities, so nothing here is sampled.
"""

import numpy as np
import pytest
import torch

from cache.key_set import key_array
from pipeline.auxdpo.nullspace import Projection, SketchedGradients
from pipeline.auxdpo.offsets import Offsets
from pipeline.objectives import PairLogps, auxdpo, dpo
from pipeline.params import AuxDPO
from tests.cache.test_sketches import keys

REWARDS = torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64)
PAIRS = [(0, 1), (1, 2), (2, 0)]
BETA = 20.0
MIXES = [(1, 1, 1), (1, 1, 100), (100, 1, 1), (1, 100, 1), (0, 1, 50), (5, 0, 40)]


def log_policy(t):
    return torch.log_softmax(torch.stack([t, -t, torch.zeros_like(t)]), dim=0)


def expected_reward(t):
    return (log_policy(torch.tensor(t, dtype=torch.float64)).exp() * REWARDS).sum().item()


def loss(objective, t, counts, offsets=None):
    """The mean loss over pairs in these numbers, each labelled both ways with its probability."""
    policy, reference = log_policy(t), log_policy(torch.zeros_like(t))
    total = 0
    for (i, j), count in zip(PAIRS, counts, strict=True):
        for won, lost in ((i, j), (j, i)):
            logps = (policy[won], policy[lost], reference[won], reference[lost])
            pair = PairLogps(*(value[None] for value in logps), *torch.ones(2, 1))
            extra = {} if offsets is None else {"chosen_offset": offsets[won], "rejected_offset": offsets[lost]}
            share = torch.sigmoid(REWARDS[won] - REWARDS[lost])
            total = total + count * share * objective(pair, beta=BETA, **extra).squeeze()
    return total / sum(counts)


def minimise(function, *start):
    leaves = [value.clone().requires_grad_() for value in start]
    optimizer = torch.optim.LBFGS(
        leaves, max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        value = function(*leaves)
        value.backward()
        return value

    optimizer.step(closure)
    return [leaf.detach() for leaf in leaves]


ZERO = torch.zeros((), dtype=torch.float64)


def optimum():
    """The KL-regularised optimum, maximised directly."""

    def negative(t):
        policy = log_policy(t)
        return -(policy.exp() * (REWARDS - BETA * (policy - log_policy(torch.zeros_like(t))))).sum()

    return minimise(negative, ZERO)[0].item()


def gradients(counts=(1.0, 1.0, 1.0)):
    """A of the bandit: d log pi / dt at the reference, one number per response."""
    t = ZERO.clone().requires_grad_()
    columns = torch.stack([torch.autograd.grad(log_policy(t)[i], t)[0] for i in range(3)]).float()[:, None]
    return SketchedGradients(columns, columns, torch.tensor(counts))


def test_the_optimum_is_the_papers():
    assert optimum() == pytest.approx(-1 / (2 * BETA), abs=1 / BETA**2)


def test_dpo_reverses_the_preference_and_loses_reward_when_pairs_of_3_and_1_dominate_and_not_when_1_and_2_do():
    reversed_, right = (
        minimise(lambda t, counts=counts: loss(dpo, t, counts), ZERO)[0].item() for counts in [(1, 1, 100), (100, 1, 1)]
    )
    assert reversed_ > 0 and expected_reward(reversed_) < expected_reward(0.0)
    assert right < 0 and expected_reward(right) > expected_reward(0.0)


@pytest.mark.parametrize("counts", MIXES)
def test_auxdpo_in_the_null_space_reaches_the_optimum_whichever_pairs_were_drawn(counts):
    project = Projection(gradients(), 1)
    t, free = minimise(lambda t, z: loss(auxdpo, t, counts, project(z)), ZERO, torch.zeros(3, dtype=torch.float64))
    assert t.item() == pytest.approx(-1 / (2 * BETA), abs=1e-4)
    assert t.item() == pytest.approx(optimum(), abs=1 / BETA**2)
    assert gradients().penalty(gradients().weights * project(free))[0].item() < 1e-10


@pytest.mark.parametrize("counts", MIXES)
def test_the_penalty_reaches_it_as_its_weight_grows(counts):
    def objective(t, delta):
        columns = gradients().sketches.double()[:, 0] / 3
        return loss(auxdpo, t, counts, delta) + 1e4 * (columns @ delta).square()

    t, delta = minimise(objective, ZERO, torch.zeros(3, dtype=torch.float64))
    assert t.item() == pytest.approx(-1 / (2 * BETA), abs=1e-3)
    assert gradients().penalty(gradients().weights * delta)[0].item() < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("constraint", ["projection", "penalty"])
@pytest.mark.parametrize("counts", [(1, 1, 100), (100, 1, 1)])
def test_offsets_trained_beside_the_policy_bring_it_to_the_optimum(constraint, counts):
    """As the trainer does it: Adam for both, one step each from the same gradient."""
    sides = torch.tensor([side for i, j in PAIRS for side in ((i, j), (j, i))])
    shares = torch.sigmoid(REWARDS[sides[:, 0]] - REWARDS[sides[:, 1]])
    shares *= torch.tensor(counts).repeat_interleave(2) / sum(counts)
    params = AuxDPO(objective="auxdpo", constraint=constraint, null_weight_absolute=300.0, offset_learning_rate=0.05)
    projection = Projection(gradients(), 1) if constraint == "projection" else None
    responses = (key_array(keys(0, 3)), torch.zeros(3, dtype=torch.int64), sides, gradients(), slice(0, 3))
    offsets = Offsets(*responses, params, mean_square=1.0, sum_over_ranks=lambda values: values, projection=projection)
    reference, every = log_policy(ZERO)[sides], np.arange(6)
    t, steps = ZERO.clone().requires_grad_(), 600
    optimizer = torch.optim.Adam([t])
    for step in range(steps):
        delta = offsets.of(every).double().requires_grad_()
        logps = (*log_policy(t)[sides].T, *reference.T)
        losses = auxdpo(
            PairLogps(*logps, *torch.ones(2, 6)), beta=BETA, chosen_offset=delta[0], rejected_offset=delta[1]
        )
        t.grad, of_offsets = torch.autograd.grad((shares * losses).sum(), [t, delta])
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / steps)
        optimizer.step()
        offsets.add(every, of_offsets)
        offsets.step(every, 1 - step / steps)
    assert t.item() == pytest.approx(-1 / (2 * BETA), abs=1e-3)
    assert offsets.summary()["null_ratio"] < 1e-3


def test_only_weights_that_do_not_follow_the_pairs_identify_the_optimum():
    """Weighting responses by the pairs they occur in tilts the null space: then offsets explain any t equally well."""
    counts = (1, 1, 100)
    sides = tuple(float(sum(n for pair, n in zip(PAIRS, counts, strict=True) if i in pair)) for i in range(3))
    least = {}
    for name, weights in (("responses", (1.0, 1.0, 1.0)), ("sides", sides)):
        project = Projection(gradients(weights), 1)
        for t in (-0.1, -1 / (2 * BETA), 0.1):
            at = ZERO + t
            (free,) = minimise(
                lambda z, at=at, project=project: loss(auxdpo, at, counts, project(z)),
                torch.zeros(3, dtype=torch.float64),
            )
            least[name, t] = loss(auxdpo, at, counts, project(free)).item()
    best = least["responses", -1 / (2 * BETA)]
    assert least["responses", -0.1] > best + 1e-4 and least["responses", 0.1] > best + 1e-4
    assert all(least["sides", t] == pytest.approx(best, abs=1e-7) for t in (-0.1, -1 / (2 * BETA), 0.1))
