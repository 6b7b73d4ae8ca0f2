"""KTO against its equations in exact arithmetic, and against TRL's own code."""

from collections import defaultdict
from importlib.metadata import PackageNotFoundError, version
from types import MethodType, SimpleNamespace

import pytest
import torch
from mpmath import mp, mpf

from pipeline.objectives import FeedbackLogps, kto

SETTINGS = {"beta": 0.3, "desirable_weight": 1.2, "undesirable_weight": 0.7}


def feedback(shift: float, *, desirable=(True, False, True, False), dtype=torch.float64) -> FeedbackLogps:
    """shift: how far the policy's mismatched log-probs lie above the reference's on average."""
    draw = torch.Generator().manual_seed(3)
    response, ref, ref_mismatched = (-20 - 3 * torch.rand(4, generator=draw).to(dtype) for _ in range(3))
    mismatched = ref_mismatched + shift + torch.tensor([0.5, -0.5, 1.0, -1.0], dtype=dtype)
    return FeedbackLogps(response.requires_grad_(), ref, mismatched, ref_mismatched, torch.tensor(desirable))


@pytest.mark.parametrize("shift", [2.0, -2.0])
def test_value_and_gradient_are_those_of_the_papers_equations(shift):
    """lambda_y - v with v of eq. 7 and z_0 of eq. 8, written as the paper has them; the gradient by its derivative."""
    batch = feedback(shift)
    losses = kto(batch, **SETTINGS)
    losses.sum().backward()
    z0 = max(mpf(0), mpf(shift))
    for i, good in enumerate(batch.desirable.tolist()):
        reward = mpf(float(batch.response[i].detach())) - mpf(float(batch.ref_response[i]))
        weight = mpf(SETTINGS["desirable_weight" if good else "undesirable_weight"])
        x = mpf(SETTINGS["beta"]) * ((reward - z0) if good else (z0 - reward))
        sigmoid = 1 / (1 + mp.exp(-x))
        assert float(losses[i].detach()) == pytest.approx(float(weight - weight * sigmoid), rel=1e-12)
        slope = -weight * sigmoid * (1 - sigmoid) * mpf(SETTINGS["beta"]) * (1 if good else -1)
        assert float(batch.response.grad[i]) == pytest.approx(float(slope), rel=1e-12)


def test_the_baseline_pulls_no_policy():
    batch = feedback(1.0)
    mismatched = batch.mismatched.requires_grad_()
    kto(batch._replace(mismatched=mismatched), beta=0.1).sum().backward()
    assert mismatched.grad is None


@pytest.mark.parametrize("shift", [2.0, -2.0])
@pytest.mark.parametrize("desirable", [(True, False, True, False), (True, True, True, True), (False,) * 4])
def test_trl_computes_the_same(shift, desirable):
    try:
        found = version("trl")
    except PackageNotFoundError:
        pytest.skip("TRL is not installed (pip install -e '.[bench]')")
    if not found.startswith("1.16."):
        pytest.skip(f"these conventions were read from TRL 1.16; {found} is installed")
    from trl.trainer.kto_trainer import KTOTrainer

    ours = feedback(shift, desirable=desirable)
    loss = kto(ours, **SETTINGS).mean()
    loss.backward()
    theirs = feedback(shift, desirable=desirable)
    # One response token each, behind a prompt token; `log_probs` have a place for every token but the first.
    ids, mask = torch.ones(4, 2, dtype=torch.long), torch.tensor([[0, 1]] * 4)

    def model(input_ids, **_):
        logps = theirs.mismatched if input_ids is kl_ids else theirs.response
        return SimpleNamespace(log_probs=logps[:, None], entropy=torch.zeros(4, 1), mean_logits=torch.zeros(4, 1))

    kl_ids = ids.clone()
    batch = {"input_ids": ids, "attention_mask": ids, "completion_mask": mask, "label": torch.tensor(desirable)}
    batch |= {"KL_input_ids": kl_ids, "KL_attention_mask": ids, "KL_completion_mask": mask}
    batch |= {"ref_logps": theirs.ref_response, "ref_KL_logps": theirs.ref_mismatched}
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=SimpleNamespace(device="cpu", gather_for_metrics=lambda value: value),
        calculate_KL=True,
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        loss_type="kto",
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        **SETTINGS,
    )
    trainer._compute_kl_logps = MethodType(KTOTrainer._compute_kl_logps, trainer)
    # Tensors move to a device first, so identity must survive: they are on it already.
    their_loss = KTOTrainer._compute_loss(trainer, model, batch, return_outputs=False)
    their_loss.backward()
    assert loss.item() == pytest.approx(their_loss.item(), abs=1e-6)
    assert torch.allclose(ours.response.grad, theirs.response.grad, rtol=0, atol=1e-6)
