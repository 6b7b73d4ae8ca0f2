"""The toy study, small: its networks, its bookkeeping and what its page says."""

import pytest
import torch

from studies.pages.settings import load_section
from studies.toy import claims as toy_claims
from studies.toy import networks as toy
from studies.toy import page as toy_page
from tests import ROOT


@pytest.fixture(scope="module")
def params():
    full = load_section(ROOT / "studies" / "params.yaml", "toy", toy.ToyParams)
    small = {"seeds": 2, "steps": 12, "fit_steps": 150}
    settings = {name: full.settings[name] for name in ("rejected likelier", "shared responses")}
    return full.model_copy(update=small | {"settings": settings})


@pytest.fixture(scope="module")
def runs(params):
    return toy.run(params)


def test_every_objective_has_a_run_in_every_setting_with_both_ends_drawn(params, runs):
    assert set(runs) == {(s, o) for s in params.settings for o in params.objectives}
    for run in runs.values():
        assert run.steps[0] == 0 and run.steps[-1] == params.steps
        assert run.trajectory.shape == (len(run.steps), params.seeds, 3)
        assert run.trajectory.sum(dim=-1).sub(1).abs().max() < 1e-12


def test_all_start_from_the_reference_that_the_setting_asks_for(params, runs):
    for (setting, _), run in runs.items():
        w, l, *others = params.settings[setting].reference  # noqa: E741
        expected = torch.tensor([w, l, sum(others)], dtype=torch.float64).expand(params.seeds, 3)
        assert torch.allclose(run.trajectory[0], expected, atol=0.03)


def test_a_network_trained_among_others_is_what_it_is_alone(params, runs):
    """Nothing leaks between the stacked networks: neither objectives nor seeds nor settings."""
    name = "shared responses"
    alone = params.model_copy(
        update={
            "seeds": 2,
            "settings": {name: params.settings[name]},
            "objectives": {"bdpo": params.objectives["bdpo"]},
        }
    )
    torch.testing.assert_close(toy.run(alone)[name, "bdpo"].trajectory, runs[name, "bdpo"].trajectory)


def test_each_setting_is_trained_by_its_own_optimizer(params):
    """One step of descent moves the policy by rate * gradient: twice as far at twice the rate, as Adam's never is."""
    setting = params.settings["shared responses"].model_copy(update={"optimizer": "descent", "reference": None})
    moved = []
    for rate in (1e-4, 2e-4):
        update = {"steps": 1, "fit_steps": 1, "settings": {"x": setting}, "learning_rate": {"descent": rate}}
        trajectory = toy.run(params.model_copy(update=update))["x", "dpo"].trajectory
        moved.append(trajectory[-1] - trajectory[0])
    torch.testing.assert_close(moved[1], 2 * moved[0], rtol=1e-2, atol=0)


def test_seeds_differ(runs):
    first, second = runs["rejected likelier", "dpo"].trajectory[-1]
    assert not torch.allclose(first, second, atol=1e-9)


def test_dpo_moves_mass_out_where_the_rejected_response_is_likelier_and_bdpo_does_not(runs):
    dpo, bdpo = (toy_claims.change(runs["rejected likelier", name]) for name in ("dpo", "bdpo"))
    assert dpo.end > 0.02 and bdpo.end < 0


@pytest.mark.parametrize("responses", toy.LAYOUTS)
def test_each_prompt_has_four_different_responses_and_layouts_are_as_described(responses):
    roles = toy.LAYOUTS[responses]
    assert all(sorted(row) == [0, 1, 2, 3] for row in roles.tolist())
    paired = set(roles[:, :2].flatten().tolist())
    assert paired == ({0, 1} if responses == "two" else {0, 1, 2, 3})


def test_the_page_has_a_row_for_each_objective_and_setting_and_checks_its_claims(params, runs, tmp_path):
    toy_page.write(params, runs, tmp_path / "toy.md", tmp_path / "toy.svg")
    page = (tmp_path / "toy.md").read_text()
    for objective in params.objectives:
        assert page.count(f"| {objective} |") == 1 + len(params.settings)
    assert all(f"## {setting}" in page for setting in params.settings)
    claims = [*toy_claims.papers_claims(params, runs), *toy_claims.own_claims(params, runs)]
    assert page.count("| true |") == sum(claim.holds for claim in claims)
    assert page.count("| **false** |") == sum(not claim.holds for claim in claims)
