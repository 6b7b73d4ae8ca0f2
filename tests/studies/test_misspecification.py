"""The study of misspecification, small: its claims, each against an independent derivation, and what its page says."""

import pytest
import torch

from pipeline.sketches.hashes import SKETCH, hashes
from pipeline.sketches.sums import TensorSketchSums
from studies.misspecification import page as misspecification_page
from studies.misspecification import worlds as misspecification
from studies.misspecification.bandit import (
    all_pairs,
    constraint,
    gain,
    make_world,
    optimum,
    pair_weights,
    sample,
    sides,
    tensor_sketch,
    value,
)
from studies.misspecification.bandit_fit import fit
from studies.misspecification.claims import own_claims, papers_claims
from studies.pages.settings import load_section
from tests import ROOT

BETA = 64.0


@pytest.fixture(scope="module")
def world():
    """24 prompts of 4 responses, 9 parameters."""
    return make_world(0, 24, 4, 3)


@pytest.fixture(scope="module")
def best(world):
    return optimum(world, BETA)


def first_order(world):
    """F^-1 E_ref[g r], the optimum times beta to first order."""
    g, weights = world.gradients.flatten(0, 1), world.weights.flatten()
    return torch.linalg.solve(g.T @ (weights[:, None] * g), g.T @ (weights * world.reward.flatten()))


def test_gradients_are_those_of_the_policy_at_the_reference(world):
    theta = torch.zeros(9, dtype=torch.float64, requires_grad=True)
    logp = (world.log_ref + world.phi @ theta).log_softmax(dim=1)
    (found,) = torch.autograd.grad(logp[5, 2], theta)
    torch.testing.assert_close(found, world.gradients[5, 2])


def test_the_optimum_is_a_maximum_and_of_first_order_in_one_over_beta(world, best):
    assert (best * BETA - first_order(world)).norm() < 0.05 * first_order(world).norm()
    for step in torch.eye(9, dtype=torch.float64) * 1e-3:
        assert value(world, best, BETA) > max(value(world, best + step, BETA), value(world, best - step, BETA))


@pytest.mark.parametrize("pairs", ["reference", "uniform", "skewed"])
def test_auxdpo_is_at_the_optimum_whichever_pairs_are_compared_and_dpo_is_not(world, best, pairs):
    weights = pair_weights(world, pairs)
    u, delta = fit(world, weights, constraint(world, world.weights))
    torch.testing.assert_close(u, first_order(world), rtol=1e-3, atol=1e-4)
    assert gain(world, u, BETA, best) > 0.99
    assert (constraint(world, world.weights) @ delta.flatten()).norm() < 1e-6
    plain, _ = fit(world, weights, offsets=False)
    assert gain(world, plain, BETA, best) < 0.98


def test_the_fit_is_where_the_loss_has_no_slope(world):
    """DPO's, by plain autograd through the policy itself at some beta."""
    weights, beta = pair_weights(world, "skewed"), 3.0
    u, _ = fit(world, weights, offsets=False)
    theta = (u / beta).requires_grad_()
    ratio = (world.log_ref + world.phi @ theta).log_softmax(dim=1) - world.log_ref
    first, second = all_pairs(4)
    margin = beta * (ratio[:, first] - ratio[:, second])
    share = torch.sigmoid(world.reward[:, first] - world.reward[:, second])
    loss = -(weights * (share * margin.sigmoid().log() + (1 - share) * (-margin).sigmoid().log())).sum()
    (slope,) = torch.autograd.grad(loss, theta)
    assert slope.abs().max() < 1e-6


def test_a_sketch_determines_what_its_rank_allows(world, best):
    exact, weights, gains = constraint(world, world.weights), pair_weights(world, "skewed"), {}
    for k in (2, 4096):
        sketch = tensor_sketch(3, 3, k, seed=1)
        u, delta = fit(world, weights, sketch @ exact)
        assert ((sketch @ exact) @ delta.flatten()).norm() < 1e-5
        gains[k] = gain(world, u, BETA, best)
    assert torch.linalg.matrix_rank(tensor_sketch(3, 3, 4096, seed=1)) == 9
    assert gains[2] < 0.9 and gains[4096] == pytest.approx(gain(world, first_order(world), BETA, best), abs=1e-3)


def test_the_sketch_is_the_pipelines():
    find = hashes(16, seed=5, purpose=SKETCH, device=torch.device("cpu"))
    sums = TensorSketchSums({"w": "g"}, 16, find, 1, torch.device("cpu"))
    draw = torch.Generator().manual_seed(0)
    delta, x = torch.randn(1, 2, 3, generator=draw), torch.randn(1, 2, 4, generator=draw)
    sums.outer("w", delta, x, slice(0, 1))
    wanted = tensor_sketch(3, 4, 16, seed=5) @ torch.einsum("nti,ntj->nij", delta, x).double().flatten()
    torch.testing.assert_close(sums.result()["g"][0].double(), wanted, rtol=1e-4, atol=1e-5)


def test_weights_by_sides_leave_the_policy_undetermined(world):
    """Any policy fits as well: with it held fixed, the offsets still find the least loss under the constraint."""
    weights = pair_weights(world, "skewed")
    u, _ = fit(world, weights, constraint(world, sides(world, weights)))
    assert u.norm() < 0.01 * first_order(world).norm()  # the closest to the reference among them
    assert sides(world, weights).sum() == pytest.approx(1)


def test_on_drawn_responses_the_constraint_needs_a_ridge_or_centred_gradients(world):
    data = sample(make_world(3, 40, 12, 3, signal=1.0), 4, seed=0)
    weights = pair_weights(data, "skewed")
    alone, _ = fit(data, weights, constraint(data, data.weights))
    centred, _ = fit(data, weights, constraint(data, data.weights, centred=True))
    ridged, delta = fit(data, weights, ridge=1e-4)
    assert alone.norm() < 0.01 * centred.norm()
    torch.testing.assert_close(ridged, centred, rtol=0.05, atol=0.05)
    assert (constraint(data, data.weights, centred=True) @ delta.flatten()).norm() < 1e-3


@pytest.mark.slow
def test_the_page_has_every_row_and_says_what_the_claims_say(tmp_path):
    full = load_section(ROOT / "studies" / "params.yaml", "misspecification", misspecification.MisspecificationParams)
    data = full.data.model_copy(update={"prompts": 30, "responses": 8, "side": 2})
    small = {"worlds": 2, "prompts": 16, "responses": 4, "side": 2, "betas": [1.0, 64.0], "sketches": [2, 512]}
    params = full.model_copy(update=small | {"data": data})
    results = misspecification.run(params)
    misspecification_page.write(params, results, tmp_path / "page.md", tmp_path / "page.svg")
    page = (tmp_path / "page.md").read_text()
    for pairs in misspecification.PAIRS:
        for method in misspecification.METHODS:
            assert page.count(f"| {pairs} | {method} |") == 1
    claims = [*papers_claims(params, results), *own_claims(params, results)]
    assert page.count("| true |") == sum(claim.holds for claim in claims)
    assert page.count("| **false** |") == sum(not claim.holds for claim in claims)
    assert all(claim.holds for claim in papers_claims(params, results) if claim.text.startswith("AuxDPO reaches"))
