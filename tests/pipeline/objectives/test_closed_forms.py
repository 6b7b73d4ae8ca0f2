"""Value and gradient of every objective in float64, against exact arithmetic and against the papers' gradients."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from mpmath import mp, mpf

from pipeline.objectives import OBJECTIVES, PairLogps, auxdpo
from tests.pipeline.objectives.cases import CASES, EXACT, IDS, LENGTHS, Exact, four_logps, gradients, pair

BETA = st.floats(0.01, 2)
FEW = settings(max_examples=7, deadline=None)


def exact_loss(name, hyperparameters, logps, lengths, shift=(0, 0)):
    w, l, ref_w, ref_l = map(mpf, logps)  # noqa: E741
    numbers = (mp.exp(w + shift[0]), mp.exp(l + shift[1]), mp.exp(ref_w), mp.exp(ref_l))
    return EXACT[name](Exact(*numbers, *lengths), **hyperparameters)


def exact_one_sided_gradients(name, hyperparameters, logps, lengths, side):
    """Left and right derivative in log pi of one side, exact to far more digits than float64 has."""
    step = mpf(10) ** -25
    ends = [[step * sign * (side == 0), step * sign * (side == 1)] for sign in (-1, 0, 1)]
    left, here, right = (exact_loss(name, hyperparameters, logps, lengths, shift) for shift in ends)
    return (here - left) / step, (right - here) / step


def wide_enough(name, hyperparameters):
    """Log-probs and log-ratios that exact arithmetic is compared on; beyond, finiteness is what is promised."""
    exponential = hyperparameters.get("divergence") in ("forward_kl", "alpha")
    return four_logps(ratio=5.0) if exponential else four_logps()


@pytest.mark.parametrize(("name", "hyperparameters"), CASES, ids=IDS)
def test_value_and_gradient_are_those_of_exact_arithmetic(name, hyperparameters):
    @FEW
    @given(wide_enough(name, hyperparameters), LENGTHS)
    def check(logps, lengths):
        # Probability one has infinite odds; ORPO's answer to that is tested by itself.
        assume(name != "orpo" or max(logps[:2]) / 2000 < -1e-6)
        x = pair(*logps, lengths)
        loss = OBJECTIVES[name](x, **hyperparameters)
        expected = float(exact_loss(name, hyperparameters, logps, lengths))
        assert loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-9)
        for side, got in enumerate(gradients(loss, x)):
            # At a kink any slope between the one-sided ones is a (sub)gradient.
            low, high = sorted(map(float, exact_one_sided_gradients(name, hyperparameters, logps, lengths, side)))
            tolerance = 1e-9 + 1e-7 * max(abs(low), abs(high))
            assert low - tolerance <= got <= high + tolerance

    check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(("name", "hyperparameters"), CASES, ids=IDS)
def test_value_and_gradient_are_finite_at_every_corner(name, hyperparameters, dtype):
    corners = torch.tensor([-5000.0, -745.0, -89.0, -1.0, -1e-6, -1e-30, 0.0], dtype=dtype)
    w, l, ref_w, ref_l = torch.cartesian_prod(*[corners] * 4).T  # noqa: E741
    for lengths in (1, 4000):
        tokens = torch.full(w.shape, lengths)
        x = PairLogps(w.clone().requires_grad_(), l.clone().requires_grad_(), ref_w, ref_l, tokens, tokens)
        loss = OBJECTIVES[name](x, **hyperparameters)
        assert loss.shape == w.shape and loss.dtype == dtype
        assert loss.isfinite().all()
        for gradient in torch.autograd.grad(loss.sum(), [x.chosen, x.rejected], allow_unused=True):
            if gradient is not None:
                # Squared norms must be finite too, or clipping turns the update into NaN.
                assert gradient.square().isfinite().all()


@given(four_logps(), BETA)
def test_dpo_gradient_is_the_papers(logps, beta):
    """Rafailov et al. 2023, section 4: dL/dlog pi(y_w) = -beta * sigmoid(r_l - r_w), and the opposite for y_l."""
    w, l, ref_w, ref_l = logps  # noqa: E741
    weight = 1 / (1 + math.exp(min(beta * ((w - ref_w) - (l - ref_l)), 700)))
    x = pair(*logps)
    got = gradients(OBJECTIVES["dpo"](x, beta=beta), x)
    assert got == pytest.approx((-beta * weight, beta * weight), rel=1e-9, abs=1e-300)


@given(four_logps(), BETA, st.floats(0, 10))
def test_dpo_nll_gradient_adds_the_weight_to_the_chosen_side_alone(logps, beta, weight):
    """BDPO paper, section 3: the NLL term pulls the chosen response with a constant force, the rejected one not."""
    x = pair(*logps)
    plain = gradients(OBJECTIVES["dpo"](x, beta=beta), x)
    got = gradients(OBJECTIVES["dpo_nll"](x, beta=beta, weight=weight), x)
    assert got == pytest.approx((plain[0] - weight, plain[1]), rel=1e-9, abs=1e-12)


@given(four_logps(), BETA, st.floats(0, 100))
def test_dpop_gradient_is_one_plus_penalty_times_as_strong_below_the_reference(logps, beta, penalty):
    """Pal et al. 2024, section 4: the factor (1 + lambda) acts on the chosen side, only where pi(y_w) < pi_ref(y_w)."""
    w, l, ref_w, ref_l = logps  # noqa: E741
    assume(w != ref_w)
    below = w < ref_w
    margin = beta * ((w - ref_w) - (l - ref_l) - (penalty * (ref_w - w) if below else 0.0))
    weight = 1 / (1 + math.exp(min(margin, 700)))
    x = pair(*logps)
    got = gradients(OBJECTIVES["dpop"](x, beta=beta, penalty=penalty), x)
    strength = 1 + penalty if below else 1.0
    assert got == pytest.approx((-beta * weight * strength, beta * weight), rel=1e-8, abs=1e-12)


@given(four_logps(), BETA, st.floats(0.01, 0.99))
def test_bdpo_gradient_is_dpos_on_the_mixture_times_the_policys_share_of_it(logps, beta, mixture):
    """arXiv 2506.12725, section 4; the share is mixture * p / (mixture * p + (1 - mixture) * q), p, q of y_l."""
    w, l, ref_w, ref_l = logps  # noqa: E741
    odds = math.log(mixture) - math.log1p(-mixture) + (l - ref_l)
    share = 1 / (1 + math.exp(-max(odds, -700)))
    high = max(math.log(mixture) + l - ref_l, math.log1p(-mixture))
    mixed = high + math.log(math.exp(math.log(mixture) + l - ref_l - high) + math.exp(math.log1p(-mixture) - high))
    weight = 1 / (1 + math.exp(min(beta * (w - ref_w - mixed), 700)))
    x = pair(*logps)
    got = gradients(OBJECTIVES["bdpo"](x, beta=beta, mixture=mixture), x)
    assert got == pytest.approx((-beta * weight, beta * weight * share), rel=1e-6, abs=1e-12)


@given(four_logps(), BETA, st.floats(-20, 20), st.floats(-20, 20))
def test_auxdpo_adds_the_offsets_in_reward_units(logps, beta, chosen_offset, rejected_offset):
    """arXiv 2510.20413: -log sigmoid(r_w - r_l + delta_w - delta_l); delta is a reward, so beta is not on it."""
    w, l, ref_w, ref_l = logps  # noqa: E741
    offsets = [torch.tensor([d], dtype=torch.float64, requires_grad=True) for d in (chosen_offset, rejected_offset)]
    loss = auxdpo(pair(*logps), beta=beta, chosen_offset=offsets[0], rejected_offset=offsets[1])
    margin = beta * ((w - ref_w) - (l - ref_l)) + chosen_offset - rejected_offset
    assert loss.item() == pytest.approx(float(mp.log1p(mp.exp(-mpf(margin)))), rel=1e-9, abs=1e-9)
    weight = 1 / (1 + math.exp(min(margin, 700)))
    got = [gradient.item() for gradient in torch.autograd.grad(loss.sum(), offsets)]
    assert got == pytest.approx([-weight, weight], rel=1e-8, abs=1e-300)


def test_auxdpo_is_no_term_of_a_sum_where_its_offsets_would_be_unconstrained():
    assert "auxdpo" not in OBJECTIVES


def test_orpo_of_a_certain_response_is_finite_and_prefers_it():
    certain, unsure = pair(0.0, -3.0, -1.0, -1.0), pair(-3.0, 0.0, -1.0, -1.0)
    low, high = OBJECTIVES["orpo"](certain, weight=1.0), OBJECTIVES["orpo"](unsure, weight=1.0)
    assert 0 <= low.item() < 1e-6 and 5 < high.item() < math.inf


@pytest.mark.parametrize("logp", [-1e-2, -1e-4, -1e-6])
def test_orpo_keeps_its_digits_in_float32_as_a_response_becomes_certain(logp):
    coarse, fine = (
        OBJECTIVES["orpo"](pair(-1.0, logp, -1.0, -1.0, (1, 1), dtype), weight=1.0)
        for dtype in (torch.float32, torch.float64)
    )
    assert coarse.item() == pytest.approx(fine.item(), rel=1e-6)


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_aot_compares_ranks_and_not_pairs(name):
    """Paired: the margins are sorted, under policy and reference. Unpaired: the log-ratios of each side are."""
    logps = torch.tensor([[-3.0, -1.0, -7.0], [-4.0, -9.0, -2.0], [-2.0, -2.0, -6.0], [-5.0, -8.0, -1.0]])
    logps = logps.double()
    w, l, ref_w, ref_l = logps  # noqa: E741
    tokens = torch.ones(3)
    got = OBJECTIVES[name](PairLogps(w, l, ref_w, ref_l, tokens, tokens), beta=0.5)
    # Margins, sorted: policy -5, 1, 8; reference -5, 3, 6. Log-ratios, sorted: -1, -1, 1 on both sides.
    ranks = {"aot": [0.0, -2.0, 2.0], "aot_unpaired": [0.0, 0.0, 0.0]}[name]
    assert got.tolist() == pytest.approx([math.log1p(math.exp(-0.5 * rank)) for rank in ranks])
