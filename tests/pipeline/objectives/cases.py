"""Every objective with hyper-parameters that reach each of its branches, and what it is in exact arithmetic.

The formulas below are written from the papers, in probabilities rather than log-probs where the paper does so, in
mpmath with 60 digits: no shared code, no shared numerical trick, no overflow.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from mpmath import mp, mpf

from pipeline.objectives import PairLogps

mp.dps = 60


class Exact(NamedTuple):
    """One pair's probabilities (policy and reference, chosen and rejected) and lengths, as exact numbers."""

    w: Any
    l: Any  # noqa: E741
    ref_w: Any
    ref_l: Any
    n_w: int
    n_l: int

    @property
    def u_w(self):
        return self.w / self.ref_w

    @property
    def u_l(self):
        return self.l / self.ref_l


def sigmoid(x):
    return 1 / (1 + mp.exp(-x))


def nls(x):
    """-log sigmoid(x)."""
    return mp.log1p(mp.exp(-x))


def reward_margin(x: Exact, beta, divergence="reverse_kl", divergence_alpha=0.5):
    """beta * (f'(u_w) - f'(u_l)), f as in the f-DPO paper's table 1."""
    derivative = {
        "reverse_kl": mp.log,
        "forward_kl": lambda u: 1 - 1 / u,
        "js": lambda u: mp.log(2 * u / (1 + u)),
        "alpha": lambda u: (
            mp.log(u) if divergence_alpha == 1 else (u ** mpf(divergence_alpha - 1) - 1) / mpf(divergence_alpha - 1)
        ),
    }[divergence]
    return beta * derivative(x.u_w), beta * derivative(x.u_l)


def _dpo(x, beta, label_smoothing=0, **f):
    r_w, r_l = reward_margin(x, beta, **f)
    return (1 - mpf(label_smoothing)) * nls(r_w - r_l) + mpf(label_smoothing) * nls(r_l - r_w)


def _nll(x, over_tokens="sum"):
    return -mp.log(x.w) / (x.n_w if over_tokens == "mean" else 1)


def _ipo(x, beta, over_tokens="sum", **f):
    s_w, s_l = reward_margin(x, 1, **f)
    if over_tokens == "mean":
        s_w, s_l = s_w / x.n_w, s_l / x.n_l
    return (s_w - s_l - 1 / (2 * mpf(beta))) ** 2


def _bpo(x, beta, alpha=1.0, link="logistic"):
    margin = min(beta * mp.log(x.u_w), -mpf(alpha) * beta * mp.log(x.u_l))
    return nls(margin) if link == "logistic" else max(mpf(0), 1 - margin)


def _exo(x, beta, label_smoothing=1e-3, **f):
    r_w, r_l = reward_margin(x, beta, **f)
    terms = [(sigmoid(r_w - r_l), 1 - mpf(label_smoothing)), (sigmoid(r_l - r_w), mpf(label_smoothing))]
    return sum(q * mp.log(q / p) for q, p in terms)


def _robust(x, beta, label_smoothing=0.1, **f):
    r_w, r_l = reward_margin(x, beta, **f)
    e = mpf(label_smoothing)
    return ((1 - e) * nls(r_w - r_l) - e * nls(r_l - r_w)) / (1 - 2 * e)


def _discopop(x, beta, tau=0.05, **f):
    r_w, r_l = reward_margin(x, beta, **f)
    share = sigmoid((r_w - r_l) / mpf(tau))
    return (1 - share) * nls(r_w - r_l) + share * mp.exp(r_l - r_w)


def _sigmoid_norm(x, beta, **f):
    r_w, r_l = reward_margin(x, beta, **f)
    return nls(r_w / x.n_w - r_l / x.n_l)


def _nca(x, beta):
    r_w, r_l = reward_margin(x, beta)
    return nls(r_w) + nls(-r_w) / 2 + nls(-r_l) / 2


def _orpo(x, weight=0.1):
    p_w, p_l = x.w ** (mpf(1) / x.n_w), x.l ** (mpf(1) / x.n_l)
    log_odds_ratio = mp.log(p_w / (1 - p_w)) - mp.log(p_l / (1 - p_l))
    return _nll(x, "mean") + mpf(weight) * nls(log_odds_ratio)


def _cpo(x, beta, weight=1.0, over_tokens="sum", label_smoothing=0.0):
    margin, e = beta * mp.log(x.w / x.l), mpf(label_smoothing)
    return (1 - e) * nls(margin) + e * nls(-margin) + weight * _nll(x, over_tokens)


def _simpo(x, beta=2.0, gamma=1.0, label_smoothing=0.0):
    margin, e = beta * (mp.log(x.w) / x.n_w - mp.log(x.l) / x.n_l) - mpf(gamma), mpf(label_smoothing)
    return (1 - e) * nls(margin) + e * nls(-margin)


EXACT: dict[str, Callable[..., Any]] = {
    "dpo": _dpo,
    "bdpo": lambda x, beta, mixture=0.5: nls(
        beta * mp.log(x.u_w * x.ref_l / (mpf(mixture) * x.l + (1 - mpf(mixture)) * x.ref_l))
    ),
    "bpo": _bpo,
    "dpo_nll": lambda x, beta, weight=1.0, over_tokens="sum", label_smoothing=0.0: (
        _dpo(x, beta, label_smoothing) + weight * _nll(x, over_tokens)
    ),
    "dpop": lambda x, beta, penalty=50.0: nls(
        beta * (mp.log(x.u_w / x.u_l) - penalty * max(mpf(0), mp.log(x.ref_w / x.w)))
    ),
    "minor_dpo": lambda x, beta: nls(beta * (mp.log(x.u_w) - max(mpf(0), mp.log(x.u_l)))),
    "robust": _robust,
    "hinge": lambda x, beta, **f: max(mpf(0), 1 - reward_margin(x, beta, **f)[0] + reward_margin(x, beta, **f)[1]),
    "ipo": _ipo,
    "exo_pair": _exo,
    "discopop": _discopop,
    "sigmoid_norm": _sigmoid_norm,
    # A batch of one pair has nothing to sort.
    "aot": _dpo,
    "aot_unpaired": _dpo,
    "sppo": lambda x, beta: (mp.log(x.u_w) - 1 / (2 * mpf(beta))) ** 2 + (mp.log(x.u_l) + 1 / (2 * mpf(beta))) ** 2,
    "nca_pair": _nca,
    "bco_pair": lambda x, beta, shift=0.0: nls(beta * mp.log(x.u_w) - shift) + nls(shift - beta * mp.log(x.u_l)),
    "apo_zero": lambda x, beta: 1 - sigmoid(beta * mp.log(x.u_w)) + sigmoid(beta * mp.log(x.u_l)),
    "apo_down": lambda x, beta: sigmoid(beta * mp.log(x.u_w)) + 1 - sigmoid(beta * mp.log(x.u_w / x.u_l)),
    "sft": _nll,
    "slic": lambda x, margin=1.0, weight=0.0, over_tokens="sum": (
        max(mpf(0), margin - mp.log(x.w / x.l)) + weight * _nll(x, over_tokens)
    ),
    "cpo": _cpo,
    "simpo": _simpo,
    "orpo": _orpo,
    "weighted_sum": lambda x, terms: sum(t["weight"] * EXACT[t["objective"]](x, **t["hyperparameters"]) for t in terms),
}

_DIVERGENCES = [{"divergence": "forward_kl"}, {"divergence": "js"}] + [
    {"divergence": "alpha", "divergence_alpha": alpha} for alpha in (0.0, 0.5, 1.0, 2.0)
]
_TERMS = [
    {"weight": 0.8, "objective": "dpo", "hyperparameters": {"beta": 0.1}},
    {"weight": 0.2, "objective": "bco_pair", "hyperparameters": {"beta": 0.3, "shift": 0.5}},
    {"weight": 1.5, "objective": "sft", "hyperparameters": {"over_tokens": "mean"}},
]
CASES: list[tuple[str, dict[str, Any]]] = [
    *[("dpo", {"beta": beta, "label_smoothing": e}) for beta, e in [(0.1, 0.0), (0.01, 0.2), (2.0, 0.49)]],
    *[("dpo", {"beta": 0.1, **f}) for f in _DIVERGENCES],
    *[("bdpo", {"beta": beta, "mixture": m}) for beta, m in [(0.1, 0.5), (1.0, 0.001), (0.5, 0.999)]],
    *[("bpo", {"beta": 0.1, "alpha": a, "link": link}) for a, link in [(1.0, "logistic"), (0.3, "hinge")]],
    *[
        ("dpo_nll", {"beta": 0.1, "weight": 0.5, "over_tokens": over, "label_smoothing": 0.1})
        for over in ("sum", "mean")
    ],
    *[("dpop", {"beta": 0.1, "penalty": p}) for p in (0.0, 5.0, 50.0)],
    ("minor_dpo", {"beta": 0.1}),
    *[("robust", {"beta": 0.1, "label_smoothing": 0.3, **f}) for f in [{}, {"divergence": "js"}]],
    *[("hinge", {"beta": 0.1, **f}) for f in [{}, {"divergence": "forward_kl"}]],
    *[("ipo", {"beta": 0.1, "over_tokens": o, **f}) for o in ("sum", "mean") for f in [{}, {"divergence": "js"}]],
    *[("exo_pair", {"beta": 0.1, "label_smoothing": 1e-3, **f}) for f in [{}, {"divergence": "forward_kl"}]],
    *[("discopop", {"beta": 0.1, "tau": tau, **f}) for tau in (0.05, 1.0) for f in [{}, {"divergence": "forward_kl"}]],
    *[("sigmoid_norm", {"beta": 2.0, **f}) for f in [{}, {"divergence": "js"}]],
    *[(name, {"beta": 0.1, "label_smoothing": 0.1}) for name in ("aot", "aot_unpaired")],
    *[("sppo", {"beta": beta}) for beta in (0.001, 0.5)],
    *[(name, {"beta": 0.1}) for name in ("nca_pair", "apo_zero", "apo_down")],
    *[("bco_pair", {"beta": 0.1, "shift": shift}) for shift in (0.0, -1.5)],
    *[("sft", {"over_tokens": over}) for over in ("sum", "mean")],
    *[("slic", {"margin": 1.0, "weight": weight, "over_tokens": "mean"}) for weight in (0.0, 0.7)],
    *[("cpo", {"beta": 0.1, "weight": 1.0, "over_tokens": o, "label_smoothing": 0.1}) for o in ("sum", "mean")],
    ("simpo", {"beta": 2.0, "gamma": 1.0, "label_smoothing": 0.1}),
    ("orpo", {"weight": 0.1}),
    ("weighted_sum", {"terms": _TERMS}),
]
IDS = [f"{name}-{'-'.join(f'{v}' for v in kw.values() if not isinstance(v, list))}" for name, kw in CASES]


def pair(chosen, rejected, ref_chosen, ref_rejected, lengths=(5, 7), dtype=torch.float64) -> PairLogps:
    """A batch of one, whose policy log-probs carry gradient."""
    values = [torch.tensor([x], dtype=dtype, requires_grad=True) for x in (chosen, rejected)]
    values += [torch.tensor([x], dtype=dtype) for x in (ref_chosen, ref_rejected)]
    return PairLogps(*values, *(torch.tensor([length]) for length in lengths))


def gradients(loss: torch.Tensor, of: PairLogps) -> tuple[float, float]:
    """d loss / d log pi_theta of the chosen and the rejected response of a batch of one; 0 where it has no part."""
    found = torch.autograd.grad(loss.sum(), [of.chosen, of.rejected], allow_unused=True)
    chosen, rejected = (0.0 if gradient is None else gradient.item() for gradient in found)
    return chosen, rejected


@st.composite
def four_logps(draw, low=-5000.0, ratio=5000.0):
    """Log-probs (chosen, rejected, ref_chosen, ref_rejected) in [low, 0], policy and reference near or far apart."""
    reference = [draw(st.floats(low, 0)) for _ in range(2)]
    shift = st.one_of(st.floats(-ratio, ratio), st.floats(-min(ratio, 5), min(ratio, 5)))
    policy = [min(0.0, max(low, logp + draw(shift))) for logp in reference]
    return *policy, *reference


LENGTHS = st.tuples(st.integers(1, 2000), st.integers(1, 2000))
