"""Objectives against closed forms in float64 and against their theorems' simplest cases."""

import inspect
import math
import typing

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline import objective_params
from pipeline.objectives import OBJECTIVES, PairLogps, bdpo, dpo

LOGP = st.floats(-5000, 0)
BETA = st.floats(0.01, 2)


def pair(chosen: float, rejected: float, ref_chosen: float, ref_rejected: float) -> PairLogps:
    values = [torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in (chosen, rejected)]
    values += [torch.tensor([x], dtype=torch.float64) for x in (ref_chosen, ref_rejected)]
    return PairLogps(*values, torch.tensor([5]), torch.tensor([7]))


def gradients(loss: torch.Tensor, of: PairLogps) -> tuple[float, float]:
    chosen, rejected = torch.autograd.grad(loss.sum(), [of.chosen, of.rejected])
    return chosen.item(), rejected.item()


@given(LOGP, LOGP, LOGP, LOGP, BETA)
def test_dpo_gradient_is_the_papers(w, l, ref_w, ref_l, beta):  # noqa: E741
    """Rafailov et al. 2023, section 4: dL/dlog pi(y_w) = -beta * sigmoid(r_l - r_w), and the opposite for y_l."""
    x = pair(w, l, ref_w, ref_l)
    margin = beta * ((w - ref_w) - (l - ref_l))
    weight = 1 / (1 + math.exp(min(margin, 700)))
    got = gradients(dpo(x, beta=beta), x)
    assert got == pytest.approx((-beta * weight, beta * weight), rel=1e-9, abs=1e-300)


@given(LOGP, LOGP, LOGP, LOGP, BETA, st.floats(0.01, 0.99))
def test_bdpo_equals_dpo_on_the_mixed_probability(w, l, ref_w, ref_l, beta, mixture):  # noqa: E741
    """arXiv 2506.12725: the rejected probability is replaced by the mixture, everything else is DPO."""
    terms = [math.log(mixture) + l, math.log(1 - mixture) + ref_l]
    mixed = max(terms) + math.log(sum(math.exp(term - max(terms)) for term in terms))
    expected = dpo(pair(w, mixed, ref_w, ref_l), beta=beta).item()
    assert bdpo(pair(w, l, ref_w, ref_l), beta=beta, mixture=mixture).item() == pytest.approx(
        expected, rel=1e-9, abs=1e-9
    )


@given(LOGP, LOGP, LOGP, LOGP, BETA, st.floats(0.01, 0.99))
def test_bdpo_is_finite_and_its_rejected_gradient_is_that_of_the_mixture(w, l, ref_w, ref_l, beta, mixture):  # noqa: E741
    x = pair(w, l, ref_w, ref_l)
    chosen, rejected = gradients(bdpo(x, beta=beta, mixture=mixture), x)
    assert math.isfinite(chosen) and math.isfinite(rejected)
    # The policy's share of the mixture scales the gradient: chain rule on log(mixture*p + (1-mixture)*q).
    odds = math.log(mixture) - math.log(1 - mixture) + (l - ref_l)
    share = 1 / (1 + math.exp(-max(odds, -700)))
    assert rejected == pytest.approx(-chosen * share, rel=1e-6, abs=1e-12)


def test_losses_of_the_reference_itself_are_log_two():
    x = pair(-12.0, -30.0, -12.0, -30.0)
    for name, objective in OBJECTIVES.items():
        assert objective(x, beta=0.1).item() == pytest.approx(math.log(2), abs=1e-12), name


def test_bdpo_refuses_a_mixture_that_is_no_mixture():
    for mixture in (0.0, 1.0, 1.5):
        with pytest.raises(ValueError, match="strictly between 0 and 1"):
            bdpo(pair(-1, -1, -1, -1), beta=0.1, mixture=mixture)


def test_every_objective_has_declared_hyperparameters_of_the_same_names():
    (union, *_) = typing.get_args(objective_params.AnyVariant)
    declared = {typing.get_args(cls.model_fields["objective"].annotation)[0]: cls for cls in typing.get_args(union)}
    assert declared.keys() == OBJECTIVES.keys()
    for name, objective in OBJECTIVES.items():
        keywords = {p.name for p in inspect.signature(objective).parameters.values() if p.kind is p.KEYWORD_ONLY}
        assert keywords == set(declared[name].model_fields) - {"objective", "settings"}, name
