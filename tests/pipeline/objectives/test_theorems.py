"""What the papers prove about their objectives, on softmax policies small enough to look at whole."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pipeline.objectives import PairLogps, bdpo, bpo, dpo
from tests.pipeline.objectives.cases import four_logps, gradients, pair

CHOSEN, REJECTED = 0, 1  # of four responses; the other two are in no pair
ONE = torch.ones(1)


def of_probabilities(w: torch.Tensor, l: torch.Tensor, ref_w: float, ref_l: float) -> PairLogps:  # noqa: E741
    reference = [torch.full_like(w, math.log(p)) for p in (ref_w, ref_l)]
    return PairLogps(w.log(), l.log(), *reference, ONE, ONE)


def descend(objective, features, reference, steps, start_rate=1.0):
    """Full-batch gradient descent on N softmax policies at once, each with logits `features @ theta` on top of the
    reference's and a step that is halved until its own loss doesn't rise.

    features: (N, 4, d); reference: log-probs (N, 4). Yields the policies' log-probs, (N, 4), the start's first.
    """

    def logps_of(theta):
        return F.log_softmax(reference + (features @ theta.unsqueeze(-1)).squeeze(-1), dim=-1)

    def loss_of(theta):
        policy = logps_of(theta)
        tokens = torch.ones(len(theta))
        x = (policy[:, CHOSEN], policy[:, REJECTED], reference[:, CHOSEN], reference[:, REJECTED], tokens, tokens)
        return objective(PairLogps(*x))

    theta = torch.zeros(len(reference), features.shape[-1], dtype=torch.float64)
    rate = torch.full((len(reference), 1), start_rate, dtype=torch.float64)
    yield logps_of(theta)
    for _ in range(steps):
        theta.requires_grad_()
        loss = loss_of(theta)
        (gradient,) = torch.autograd.grad(loss.sum(), theta)
        theta = theta.detach()
        for _ in range(12):
            moved = theta - rate * gradient
            rises = loss_of(moved) > loss.detach()
            if not rises.any():
                break
            rate = torch.where(rises.unsqueeze(-1), rate / 2, rate)
        theta = torch.where(rises.unsqueeze(-1), theta, moved)
        rate = rate * 1.5
        yield logps_of(theta)


def random_policies(n, dimensions, seed=0):
    """Shared features, so that raising one response's logit moves the others', as in a network."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(n, 4, dimensions, generator=generator, dtype=torch.float64)
    return features, F.log_softmax(2 * torch.randn(n, 4, generator=generator, dtype=torch.float64), dim=-1)


def tabular(n):
    reference = torch.tensor([[0.4, 0.1, 0.3, 0.2]], dtype=torch.float64).log()
    return torch.eye(4, dtype=torch.float64).expand(n, 4, 4), reference.expand(n, 4)


@pytest.mark.parametrize("mixture", [0.1, 0.5, 0.9])
def test_bdpos_minimiser_puts_one_on_chosen_and_zero_on_rejected(mixture):
    grid = torch.linspace(1e-6, 1 - 1e-6, 101, dtype=torch.float64)
    w, l = torch.meshgrid(grid, grid, indexing="ij")  # noqa: E741
    inside = w + l <= 1
    w, l = w[inside], l[inside]  # noqa: E741
    losses = bdpo(of_probabilities(w, l, 0.4, 0.1), beta=0.5, mixture=mixture)
    best = losses.argmin()
    assert (w[best].item(), l[best].item()) == (pytest.approx(1, abs=1e-5), pytest.approx(0, abs=1e-5))
    # Along each axis by itself too: no other point on the boundary is as good.
    x = of_probabilities(w.clone().requires_grad_(), l.clone().requires_grad_(), 0.4, 0.1)
    by_w, by_l = torch.autograd.grad(bdpo(x, beta=0.5, mixture=mixture).sum(), [x.chosen, x.rejected])
    assert (by_w < 0).all() and (by_l > 0).all()


def test_descent_on_bdpo_reaches_its_minimiser_in_a_softmax_table():
    *_, last = descend(lambda x: bdpo(x, beta=1.0, mixture=0.5), *tabular(1), steps=200)
    assert last[0, CHOSEN].exp() > 0.99 and last[0, REJECTED].exp() < 0.01


def test_dpo_has_minimising_sequences_that_leave_the_chosen_response():
    """Its loss goes to 0 with pi(y_w) held at 0.01, a fortieth of the reference's, while pi(y_l) goes to 0."""
    w = torch.tensor([0.01], dtype=torch.float64)
    losses = [dpo(of_probabilities(w, w * 10.0**-k, 0.4, 0.1), beta=0.5).item() for k in (0, 10, 50, 150)]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 1e-12
    bounded = bdpo(of_probabilities(w, w * 1e-150, 0.4, 0.1), beta=0.5, mixture=0.5).item()
    assert bounded > math.log(2)  # BDPO never takes that for better than the reference


@pytest.mark.parametrize("mixture", [0.1, 0.5, 0.9])
def test_bdpo_never_lets_chosen_fall_below_its_bound_under_full_batch_descent(mixture):
    policies = random_policies(100, 2)
    floor = policies[1][:, CHOSEN] + math.log1p(-mixture)
    for logps in descend(lambda x: bdpo(x, beta=0.5, mixture=mixture), *policies, steps=60):
        assert (logps[:, CHOSEN] >= floor - 1e-9).all()


def test_dpo_does_fall_below_that_bound_on_the_same_policies():
    policies = random_policies(100, 2)
    *_, last = descend(lambda x: dpo(x, beta=0.5), *policies, steps=60)
    assert (last[:, CHOSEN] < policies[1][:, CHOSEN] + math.log(0.5) - 0.1).any()


@pytest.mark.parametrize(("alpha", "link"), [(0.3, "logistic"), (1.0, "logistic"), (0.5, "hinge")])
def test_bpo_keeps_the_chosen_reward_from_falling_where_dpo_makes_it_fall(alpha, link):
    features, reference = random_policies(100, 2)
    *_, after_dpo = descend(lambda x: dpo(x, beta=0.5), features, reference, steps=30)
    falls = after_dpo[:, CHOSEN] < reference[:, CHOSEN] - 0.1
    assert falls.sum() >= 5
    for logps in descend(
        lambda x: bpo(x, beta=0.5, alpha=alpha, link=link), features[falls], reference[falls], steps=30
    ):
        assert (logps[:, CHOSEN] >= reference[falls, CHOSEN] - 1e-9).all()


@given(four_logps(low=-500.0, ratio=10.0), st.floats(0.01, 2))
def test_bdpo_tends_to_dpo_in_value_and_gradient_as_the_mixture_tends_to_one(logps, beta):
    assume(abs(logps[1] - logps[3]) <= 10)
    x = pair(*logps)
    limit, limit_gradients = dpo(x, beta=beta), gradients(dpo(x, beta=beta), x)
    previous = math.inf
    for exponent in (2, 4, 6, 8, 10):
        near = bdpo(x, beta=beta, mixture=1 - 10.0**-exponent)
        # |log(mixture + (1 - mixture) e^-a)| <= (1 - mixture)(e^-a + 1 + ...), and the loss is beta-Lipschitz in it.
        distance = abs(near.item() - limit.item())
        assert distance <= previous + 1e-9
        previous = distance
    assert distance <= 2 * beta * 1e-10 * (1 + math.exp(10)) + 1e-9
    assert gradients(near, x) == pytest.approx(limit_gradients, rel=1e-4, abs=1e-5)


@given(st.floats(0.05, 0.95), st.floats(0.05, 0.9), st.floats(0.1, 0.9))
def test_bdpos_gradient_in_the_rejected_probability_stays_bounded_while_dpos_diverges(mixture, ref_l, beta):
    ref_w, w = (1 - ref_l) / 2, torch.tensor([(1 - ref_l) / 2], dtype=torch.float64)
    bound = beta * mixture / ((1 - mixture) * ref_l)
    plain = []
    for exponent in (1, 10, 100, 300):
        l = torch.tensor([10.0**-exponent], dtype=torch.float64, requires_grad=True)  # noqa: E741
        x = of_probabilities(w, l, ref_w, ref_l)
        (bounded,) = torch.autograd.grad(bdpo(x, beta=beta, mixture=mixture).sum(), l, retain_graph=True)
        (diverging,) = torch.autograd.grad(dpo(x, beta=beta).sum(), l)
        assert 0 < bounded.item() <= bound * (1 + 1e-9)
        plain.append(diverging.item())
    # beta * sigmoid(-m) / pi_l grows like pi_l^(beta - 1).
    assert plain == sorted(plain) and plain[-1] > 1e20


@given(four_logps(), st.floats(0.01, 2), st.floats(0.01, 1), st.sampled_from(["logistic", "hinge"]))
@settings(max_examples=200)
def test_bpos_gradient_reaches_exactly_the_response_with_the_smaller_term(logps, beta, alpha, link):
    chosen_term, rejected_term = logps[0] - logps[2], -alpha * (logps[1] - logps[3])
    # Saturated links have no gradient left in float64 (logistic) or at all (hinge).
    assume(beta * min(chosen_term, rejected_term) < (1 if link == "hinge" else 700))
    x = pair(*logps)
    by_chosen, by_rejected = gradients(bpo(x, beta=beta, alpha=alpha, link=link), x)
    assert (by_chosen < 0) + (by_rejected > 0) == 1 and by_chosen * by_rejected == 0
    if not math.isclose(chosen_term, rejected_term, rel_tol=1e-9, abs_tol=1e-9):
        assert (by_chosen < 0) == (chosen_term < rejected_term)


def test_bpo_raises_the_chosen_response_at_the_start_where_both_terms_are_zero():
    x = pair(-12.0, -30.0, -12.0, -30.0)
    assert gradients(bpo(x, beta=0.1, alpha=0.5), x) == (pytest.approx(-0.05), 0.0)
