"""Every objective that TRL has too, against TRL's own loss code: value and gradient to 1e-6.

TRL is a peer to measure against (the `bench` extra), no dependency: without it these tests skip.
"""

import os
from collections import defaultdict
from importlib.metadata import PackageNotFoundError, version
from types import SimpleNamespace

import pytest
import torch

from pipeline.objectives import OBJECTIVES, PairLogps

BATCH, PROMPT, LONGEST = 16, 3, 12
DPO_CASES = [
    # TRL's loss type, its settings, our objective, our hyper-parameters besides beta.
    ("sigmoid", {}, "dpo", {}),
    ("sigmoid", {"f_divergence_type": "forward_kl"}, "dpo", {"divergence": "forward_kl"}),
    ("sigmoid", {"f_divergence_type": "js_divergence"}, "dpo", {"divergence": "js"}),
    *[
        (
            "sigmoid",
            {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": alpha},
            "dpo",
            {"divergence": "alpha", "divergence_alpha": alpha},
        )
        for alpha in (0.0, 0.5, 1.0, 1.5)
    ],
    ("hinge", {}, "hinge", {}),
    ("hinge", {"f_divergence_type": "js_divergence"}, "hinge", {"divergence": "js"}),
    ("ipo", {}, "ipo", {"over_tokens": "mean"}),
    ("ipo", {"f_divergence_type": "forward_kl"}, "ipo", {"over_tokens": "mean", "divergence": "forward_kl"}),
    ("exo_pair", {"label_smoothing": 1e-3}, "exo_pair", {"label_smoothing": 1e-3}),
    (
        "exo_pair",
        {"label_smoothing": 0.2, "f_divergence_type": "js_divergence"},
        "exo_pair",
        {"label_smoothing": 0.2, "divergence": "js"},
    ),
    ("nca_pair", {}, "nca_pair", {}),
    ("robust", {"label_smoothing": 0.2}, "robust", {"label_smoothing": 0.2}),
    ("bco_pair", {}, "bco_pair", {}),
    ("sppo_hard", {}, "sppo", {}),
    ("aot", {"label_smoothing": 0.1}, "aot", {"label_smoothing": 0.1}),
    ("aot_unpaired", {"label_smoothing": 0.1}, "aot_unpaired", {"label_smoothing": 0.1}),
    ("apo_zero", {}, "apo_zero", {}),
    ("apo_down", {}, "apo_down", {}),
    ("discopop", {"args": SimpleNamespace(discopop_tau=0.05)}, "discopop", {"tau": 0.05}),
    ("discopop", {"args": SimpleNamespace(discopop_tau=0.7)}, "discopop", {"tau": 0.7}),
    ("sigmoid_norm", {}, "sigmoid_norm", {}),
    ("sigmoid_norm", {"f_divergence_type": "forward_kl"}, "sigmoid_norm", {"divergence": "forward_kl"}),
]


@pytest.fixture(scope="module")
def trl():
    try:
        found = version("trl")
    except PackageNotFoundError:
        pytest.skip("TRL is not installed (pip install -e '.[bench]')")
    if not found.startswith("1.16."):
        pytest.skip(f"these conventions were read from TRL 1.16; {found} is installed")
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from trl.experimental.cpo.cpo_trainer import CPOTrainer
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer
    from trl.trainer.dpo_trainer import DPOTrainer

    return SimpleNamespace(dpo=DPOTrainer, cpo=CPOTrainer, orpo=ORPOTrainer)


class Batch:
    """Token log-probs of BATCH pairs with prompts and padding around the responses, as TRL lays them out."""

    def __init__(self, seed: int, dtype: torch.dtype, equal_lengths: bool = False) -> None:
        draw = torch.Generator().manual_seed(seed)
        lengths = torch.randint(1, LONGEST + 1, (2 * BATCH,), generator=draw)
        if equal_lengths:
            lengths[:] = LONGEST
        width = PROMPT + LONGEST
        places = torch.arange(width)
        self.mask = ((places >= PROMPT) & (places < PROMPT + lengths[:, None])).long()  # (2B, width)
        self.lengths = lengths
        # Place t holds the log-prob of token t + 1, so the first place of all has no token's.
        self.tokens = (-torch.rand(2 * BATCH, width - 1, generator=draw).to(dtype) * self.mask[:, 1:]).requires_grad_()
        shift = torch.randn(2 * BATCH, generator=draw).to(dtype)
        self.reference = (self.tokens.detach().sum(dim=1) + 2 * shift).clamp(max=-0.1)

    def pair(self) -> PairLogps:
        chosen, rejected = self.tokens.sum(dim=1).chunk(2)
        return PairLogps(chosen, rejected, *self.reference.chunk(2), *self.lengths.chunk(2))


def trl_dpo_loss(trl, batch: Batch, losses: dict[str, float], beta: float, settings: dict) -> torch.Tensor:
    """TRL's DPOTrainer._compute_loss with a model that answers `batch`, and no trainer around it."""
    outputs = SimpleNamespace(
        log_probs=batch.tokens,
        entropy=torch.zeros_like(batch.tokens),
        mean_logits=torch.zeros_like(batch.tokens),
        is_top1=torch.zeros_like(batch.tokens, dtype=torch.bool),
    )
    own = {
        "beta": beta,
        "loss_types": list(losses),
        "loss_weights": list(losses.values()),
        "ld_alpha": None,
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
        "label_smoothing": 0.0,
        "use_weighting": False,
        "aux_loss_enabled": False,
        "precompute_ref_logps": True,
        "model": SimpleNamespace(training=True),
        "accelerator": SimpleNamespace(
            device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x, unwrap_model=lambda m: m
        ),
        "_metrics": {"train": defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    inputs = {
        "input_ids": torch.zeros_like(batch.mask),
        "attention_mask": torch.ones_like(batch.mask),
        "completion_mask": batch.mask,
        "ref_chosen_logps": batch.reference[:BATCH],
        "ref_rejected_logps": batch.reference[BATCH:],
    }
    return trl.dpo._compute_loss(SimpleNamespace(**own | settings), lambda **_: outputs, inputs, False)


def assert_same(ours: torch.Tensor, theirs: torch.Tensor, batch: Batch) -> None:
    """Equal means over the batch, and equal gradients in every token's log-prob."""
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6, abs=1e-6)
    (our_gradient,) = torch.autograd.grad(ours, batch.tokens)
    (their_gradient,) = torch.autograd.grad(theirs, batch.tokens)
    inside = batch.mask[:, 1:].bool()
    torch.testing.assert_close(our_gradient[inside], their_gradient[inside], rtol=1e-6, atol=1e-6)
    assert their_gradient[inside].abs().max() > 1e-4  # something to compare


@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize(("loss", "settings", "name", "hyperparameters"), DPO_CASES)
def test_the_same_loss_and_gradient_as_trls_dpo_trainer(trl, loss, settings, name, hyperparameters, beta):
    # TRL's alpha divergence knows float32 and narrower only.
    batch = Batch(1, torch.float32 if "f_alpha_divergence_coef" in settings else torch.float64)
    ours = OBJECTIVES[name](batch.pair(), beta=beta, **hyperparameters).mean()
    assert_same(ours, trl_dpo_loss(trl, batch, {loss: 1.0}, beta, settings), batch)


def test_sft_is_trls_where_all_responses_are_as_long(trl):
    """TRL averages over the batch's tokens, we over each response's; docs/objectives.md says so."""
    batch = Batch(2, torch.float64, equal_lengths=True)
    theirs = trl_dpo_loss(trl, batch, {"sft": 1.0}, 0.1, {})
    assert_same(OBJECTIVES["sft"](batch.pair(), over_tokens="mean").mean(), theirs, batch)


def test_weighted_sum_is_trls_list_of_loss_types(trl):
    """The mixture of the MPO paper: sigmoid, bco_pair and sft; with sft it is also dpo_nll, which TRL called rpo."""
    batch = Batch(3, torch.float64, equal_lengths=True)
    terms = [
        {"weight": 0.8, "objective": "dpo", "hyperparameters": {"beta": 0.1}},
        {"weight": 0.2, "objective": "bco_pair", "hyperparameters": {"beta": 0.1}},
        {"weight": 1.0, "objective": "sft", "hyperparameters": {"over_tokens": "mean"}},
    ]
    ours = OBJECTIVES["weighted_sum"](batch.pair(), terms=terms).mean()
    assert_same(ours, trl_dpo_loss(trl, batch, {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}, 0.1, {}), batch)
    ours = OBJECTIVES["dpo_nll"](batch.pair(), beta=0.1, weight=0.7, over_tokens="mean").mean()
    assert_same(ours, trl_dpo_loss(trl, batch, {"sigmoid": 1.0, "sft": 0.7}, 0.1, {}), batch)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_the_same_contrast_as_trls_cpo_trainer(trl, label_smoothing):
    batch, beta, gamma = Batch(4, torch.float64), 0.7, 0.9
    own = {"alpha": 0.0, "beta": beta, "label_smoothing": label_smoothing, "simpo_gamma": gamma}
    accelerator = SimpleNamespace(device="cpu")
    x = batch.pair()
    ours = OBJECTIVES["cpo"](x, beta=beta, weight=0.0, label_smoothing=label_smoothing).mean()
    stand_in = SimpleNamespace(accelerator=accelerator, loss_type="sigmoid", **own)
    assert_same(ours, trl.cpo.cpo_loss(stand_in, x.chosen, x.rejected)[0].mean(), batch)

    ours = OBJECTIVES["simpo"](x := batch.pair(), beta=beta, gamma=gamma, label_smoothing=label_smoothing).mean()
    stand_in = SimpleNamespace(accelerator=accelerator, loss_type="simpo", **own)
    averages = x.chosen / x.chosen_lengths, x.rejected / x.rejected_lengths
    assert_same(ours, trl.cpo.cpo_loss(stand_in, *averages)[0].mean(), batch)


def test_the_same_odds_ratio_as_trls_orpo_trainer(trl):
    batch, weight = Batch(5, torch.float32), 0.4
    x = batch.pair()
    ours = (OBJECTIVES["orpo"](x, weight=weight) - x.chosen_nll("mean")).mean()
    stand_in = SimpleNamespace(accelerator=SimpleNamespace(device="cpu"), beta=weight)
    averages = x.chosen / x.chosen_lengths, x.rejected / x.rejected_lengths
    assert_same(ours, -trl.orpo.odds_ratio_loss(stand_in, *averages)[0].mean(), batch)
