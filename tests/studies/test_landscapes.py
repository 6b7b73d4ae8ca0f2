"""What the landscape study measures, against what pen and paper say."""

import math

import pytest
import torch
from pydantic import TypeAdapter

from pipeline.params import AnyVariant
from studies.landscapes import claims as landscape_claims
from studies.landscapes.survey import LandscapeParams, Reference, flow, simplex, survey
from studies.pages.settings import load_section
from tests import ROOT

REFERENCE = Reference(chosen=0.4, rejected=0.1)


def variant(**settings):
    return TypeAdapter(AnyVariant).validate_python({"beta": 0.1, **settings})


def measured(**settings):
    return survey(variant(**settings), REFERENCE, 40)


def test_bdpo_is_least_at_the_corner_and_never_better_below_its_floor():
    x = measured(objective="bdpo", mixture=0.7)
    assert x.minimum == (pytest.approx(1, abs=0.05), pytest.approx(0, abs=0.05)) and x.best < x.abandoned
    assert x.lowest_chosen == pytest.approx(0.3 * 0.4)
    # At pi_l = 0: -log sigmoid(beta (log 2.5 - log 0.3)).
    assert x.best == pytest.approx(math.log1p(math.exp(-0.1 * math.log(2.5 / 0.3))))
    assert x.rejected_slope[1] == pytest.approx(x.rejected_slope[0], rel=0.01)


@pytest.mark.parametrize("settings", [{"objective": "dpo"}, {"objective": "dpop", "penalty": 50.0}])
def test_dpo_and_dpop_pay_any_fall_of_the_chosen_with_the_rejected(settings):
    x = measured(**settings)
    assert x.lowest_chosen == 0 and x.abandoned == pytest.approx(x.best, abs=1e-9) and x.better_with_less > 0
    assert x.rejected_slope[1] > 100 * x.rejected_slope[0]


@pytest.mark.parametrize("weight", [0.1, 1.0, 10.0])
def test_dpo_nll_is_better_than_the_start_down_to_a_floor_that_its_weight_sets(weight):
    # weight * log(ref_w / pi_w) may grow by no more than the logistic term's log 2.
    x = measured(objective="dpo_nll", weight=weight)
    assert x.lowest_chosen == pytest.approx(0.4 * 2 ** (-1 / weight))


def test_bpo_is_better_than_the_start_only_with_more_of_the_chosen():
    x = measured(objective="bpo", alpha=0.5)
    assert x.better_with_less == 0 and x.lowest_chosen == pytest.approx(0.4)


def test_dpo_raises_the_others_exactly_where_the_rejected_response_is_likelier():
    w, l = simplex(20)  # noqa: E741
    speed_w, speed_l = flow(variant(objective="dpo"), REFERENCE, w, l)
    assert (speed_w > 0).all()
    off_diagonal = (w - l).abs() > 1e-9
    assert torch.equal((speed_w + speed_l < 0)[off_diagonal], (w < l)[off_diagonal])


def test_the_flow_is_that_of_descent_on_three_logits():
    theta = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64, requires_grad=True)
    logps = theta.log_softmax(dim=0)
    margin = 0.1 * (
        logps[0] - math.log(0.4) - torch.logaddexp(logps[1] - math.log(0.1), torch.tensor(0.0)) + math.log(2)
    )
    (gradient,) = torch.autograd.grad(-torch.nn.functional.logsigmoid(margin), theta)
    with torch.no_grad():
        moved = ((theta - 1e-7 * gradient).softmax(dim=0) - theta.softmax(dim=0)) / 1e-7
        w, l, _ = theta.softmax(dim=0)  # noqa: E741
    speed_w, speed_l = flow(variant(objective="bdpo", mixture=0.5), REFERENCE, w[None], l[None])
    assert (speed_w.item(), speed_l.item()) == (
        pytest.approx(moved[0].item(), rel=1e-5),
        pytest.approx(moved[1].item(), rel=1e-5),
    )


def test_the_claims_are_judged_by_the_surveys():
    full = load_section(ROOT / "studies" / "params.yaml", "landscapes", LandscapeParams)
    params = full.model_copy(update={"grid": 40})
    surveys = {name: survey(v, params.reference, params.grid) for name, v in params.objectives.items()}
    assert all(claim.holds for claim in landscape_claims.papers_claims(params, surveys))
    # Were BDPO's landscape DPO's, what sets BDPO apart would be false; what DPO does by itself stays true.
    confused = surveys | {"BDPO": surveys["DPO"]}
    judged = [claim.holds for claim in landscape_claims.papers_claims(params, confused)]
    assert judged == [True, False, False, False, True]
