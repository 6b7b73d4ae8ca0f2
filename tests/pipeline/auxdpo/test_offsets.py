"""AuxDPO's offsets as they train: gradients, the optimiser, ranks, what is saved and told; closed forms, no policy."""

import numpy as np
import polars as pl
import pytest
import torch
from torch.nn.functional import softplus

from cache.key_set import key_array
from pipeline.auxdpo.nullspace import Projection, SketchedGradients
from pipeline.auxdpo.offsets import Offsets, response_weights, summarise_shares
from pipeline.errors import RunFailed
from pipeline.objectives.pair import PairLogps
from pipeline.params import AuxDPO
from tests.cache.test_sketches import keys
from tests.pipeline.auxdpo.test_nullspace import draw, weighted

M, PAIRS, WIDTH = 10, 8, 6
# Response 0 is in three pairs, 9 in none of its own but as a loser twice.
SIDES = torch.tensor([[0, 1], [0, 2], [0, 3], [4, 5], [6, 9], [7, 9], [8, 2], [5, 6]])  # pairs of one prompt
PROMPTS = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 0, 1])
MARGINS = draw(PAIRS, seed=11)
EVERYTHING = np.arange(PAIRS)


def params(**fields) -> AuxDPO:
    """Not centred unless asked for."""
    return AuxDPO(objective="auxdpo", **{"centred": False} | fields)


def sketched(scale: float = 1.0) -> SketchedGradients:
    return SketchedGradients(scale * draw(M, WIDTH), draw(M, 5, seed=1), torch.bincount(SIDES.flatten(), minlength=M))


def make(gradients=None, *, rows=slice(0, M), sum_over_ranks=lambda x: x, projection=None, **fields) -> Offsets:
    gradients = gradients or sketched()
    share = SketchedGradients(
        gradients.sketches[rows], gradients.audit[rows], torch.ones(len(gradients.sketches[rows]))
    )
    return Offsets(
        key_array(keys(0, M)),
        PROMPTS,
        SIDES,
        share,
        rows,
        params(**fields),
        mean_square=gradients.sketches.double().square().sum(dim=1).mean().item(),
        sum_over_ranks=sum_over_ranks,
        projection=projection,
    )


def logps(pairs: np.ndarray = EVERYTHING, beta: float = 0.1) -> PairLogps:
    """Whose policy margin is MARGINS."""
    policy = (MARGINS[pairs] / beta - 5).requires_grad_()
    others = torch.full((3, len(pairs)), -5.0)
    return PairLogps(policy, *others, *torch.ones(2, len(pairs)))


def data_loss(delta: torch.Tensor, pairs: np.ndarray = EVERYTHING) -> torch.Tensor:
    sides = SIDES[pairs]
    return softplus(-(MARGINS[pairs].to(delta.dtype) + delta[sides[:, 0]] - delta[sides[:, 1]])).mean()


def advance(offsets: Offsets, batch: np.ndarray, factor: float = 1.0, micros: int = 1) -> dict[str, float]:
    for micro in np.array_split(batch, micros):
        offsets.losses(logps(micro), micro, batch)
    return offsets.step(batch, factor)


def total_gradient(offsets: Offsets, batch: np.ndarray, micros: int = 1) -> torch.Tensor:
    advance(offsets, batch, micros=micros)
    return offsets.values.grad


# gradients ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["responses", "sides"])
@pytest.mark.parametrize("batch", [EVERYTHING, np.array([1, 4, 5, 6])])
def test_a_steps_gradient_is_that_of_the_batchs_loss_the_whole_penalty_and_the_ridge(weights, batch):
    offsets = make(weights=weights, null_weight_absolute=3.0, ridge=0.5)
    offsets.values.copy_(draw(M, seed=4))
    delta = offsets.values.double().requires_grad_()
    counts = torch.bincount(SIDES.flatten(), minlength=M).double()
    w = counts / counts.sum() if weights == "sides" else torch.full((M,), 1 / M, dtype=torch.float64)
    penalty = ((w * delta) @ sketched().sketches.double()).square().sum()
    (data_loss(delta, batch) + 3 * penalty + 0.5 * (w * delta.square()).sum()).backward()
    torch.testing.assert_close(total_gradient(offsets, batch, micros=3).double(), delta.grad, rtol=1e-5, atol=1e-7)


def centred(delta: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Prompt by prompt, the slow way."""
    found = delta.clone()
    for prompt in PROMPTS.unique():
        own = prompt == PROMPTS
        if w[own].sum() > 0:
            found[own] = delta[own] - (w[own] * delta[own]).sum() / w[own].sum()
    return found


@pytest.mark.parametrize("constraint", ["penalty", "batch"])
@pytest.mark.parametrize("weights", ["responses", "sides"])
def test_centred_offsets_enter_the_constraint_less_their_prompts_mean(weights, constraint):
    batch = np.array([0, 1, 4, 6])
    fields = {"weights": weights, "constraint": constraint, "null_weight_absolute": 3.0, "centred": True}
    offsets = make(**fields)
    offsets.values.copy_(draw(M, seed=4))
    delta = offsets.values.double().requires_grad_()
    sides = SIDES if constraint == "penalty" else SIDES[batch]
    w = response_weights(sides, M, params(**fields)).double()
    penalty = ((w * centred(delta, w)) @ sketched().sketches.double()).square().sum()
    (data_loss(delta, batch) + 3 * penalty).backward()
    row = advance(offsets, batch, micros=2)
    torch.testing.assert_close(offsets.values.grad.double(), delta.grad, rtol=1e-5, atol=1e-7)
    assert row.popitem()[1] == pytest.approx(penalty.item(), rel=1e-5)


def test_what_all_responses_of_a_prompt_have_in_common_is_no_business_of_the_centred_constraint():
    offsets, shifted = make(centred=True), make(centred=True)
    offsets.values.copy_(draw(M, seed=4))
    shifted.values.copy_(offsets.values + torch.tensor([10.0, -7.0])[PROMPTS])
    for name in ("penalty", "penalty_audit", "null_ratio"):
        assert shifted.summary()[name] == pytest.approx(offsets.summary()[name], rel=1e-3), name
    assert make().summary()["penalty"] == 0


def test_the_batch_constraint_is_the_papers_penalty_of_the_batch_alone():
    batch = np.array([0, 1, 3])
    offsets = make(weights="sides", constraint="batch", null_weight_absolute=2.0)
    offsets.values.copy_(draw(M, seed=4))
    rows = SIDES[batch].flatten()
    delta = offsets.values.clone().requires_grad_()
    penalty = (delta[rows] @ sketched().sketches[rows] / len(rows)).square().sum()  # ||(1/2P) sum_j delta_j g_j||^2
    (data_loss(delta, batch) + 2 * penalty).backward()
    row = advance(offsets, batch)
    torch.testing.assert_close(offsets.values.grad, delta.grad, rtol=1e-5, atol=1e-7)
    assert row["offsets/batch_penalty"] == pytest.approx(penalty.item(), rel=1e-5)


def test_the_losses_are_dpos_at_the_shifted_margin_with_gradient_for_the_policy_alone():
    offsets = make()
    offsets.values.copy_(draw(M, seed=4))
    pair = logps()
    losses, sums = offsets.losses(pair, EVERYTHING, EVERYTHING)
    torch.testing.assert_close(losses.mean(), data_loss(offsets.values))
    (found,) = torch.autograd.grad(losses.sum(), pair.chosen)
    shifts = offsets.values[SIDES[:, 0]] - offsets.values[SIDES[:, 1]]
    torch.testing.assert_close(found, -0.1 * torch.sigmoid(-(MARGINS + shifts)))
    row = summarise_shares({name: value.item() / PAIRS for name, value in sums.items()})
    assert row == {
        "offsets/margins": pytest.approx(shifts.mean().item(), rel=1e-5),
        "offsets/share": pytest.approx((shifts.abs().sum() / (shifts.abs() + MARGINS.abs()).sum()).item(), rel=1e-5),
    }


def test_zero_offsets_explain_nothing():
    _, sums = make().losses(logps()._replace(chosen=torch.full((PAIRS,), -5.0)), EVERYTHING, EVERYTHING)
    assert summarise_shares({name: value.item() for name, value in sums.items()})["offsets/share"] == 0


# the optimiser --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["responses", "sides"])
def test_trained_offsets_reach_the_minimum_of_their_objective(weights):
    steps, w = 600, response_weights(SIDES, M, params(weights=weights)).double()
    offsets = make(weights=weights, null_weight_absolute=5.0, ridge=0.3, offset_learning_rate=0.05)
    for step in range(steps):
        advance(offsets, EVERYTHING, factor=1 - step / steps)
    delta = torch.zeros(M, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([delta], max_iter=200, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def objective():
        optimizer.zero_grad()
        penalty = ((w * delta) @ sketched().sketches.double()).square().sum()
        loss = data_loss(delta) + 5 * penalty + 0.3 * (w * delta.square()).sum()
        loss.backward()
        return loss

    optimizer.step(objective)
    assert delta.detach().abs().max() > 0.3  # else zero would do
    torch.testing.assert_close(offsets.values.double(), delta.detach(), rtol=0, atol=2e-3)


@pytest.mark.slow
def test_projected_offsets_stay_in_the_null_space_and_reach_the_minimum_there():
    steps, projection = 600, Projection(sketched(), 4)
    offsets = make(constraint="projection", ridge=0.3, offset_learning_rate=0.05, projection=projection)
    for step in range(steps):
        row = advance(offsets, EVERYTHING, factor=1 - step / steps)
        assert (projection.basis.T @ offsets.values).abs().max() < 1e-5
    assert "offsets/penalty" not in row
    delta = offsets.values.double().requires_grad_()
    (data_loss(delta) + 0.3 * delta.square().mean()).backward()
    assert projection(delta.grad).abs().max() < 2e-4 and delta.grad.abs().max() > 1e-2


def test_the_schedule_scales_the_step():
    full, half = make(), make()
    advance(full, EVERYTHING), advance(half, EVERYTHING, factor=0.5)
    torch.testing.assert_close(half.values, 0.5 * full.values)


def test_offsets_that_are_no_longer_finite_stop_the_run():
    offsets = make(sketched(1e25), null_weight_absolute=1e30)
    offsets.values.fill_(1.0)
    with pytest.raises(RunFailed, match="Lower offset_learning_rate or null_weight_absolute"):
        advance(offsets, EVERYTHING)


# what is kept and told ------------------------------------------------------------------------------------------------


def test_a_resumed_run_makes_the_same_steps_bit_by_bit(tmp_path):
    whole, first, resumed = (make(null_weight_absolute=10.0, offset_learning_rate=0.05) for _ in range(3))
    batches = [np.array([0, 3, 5, 6]), np.array([1, 2, 4, 7]), np.array([0, 1, 6, 7]), np.array([2, 3, 4, 5])]
    rows = [advance(whole, batch, factor=0.9) for batch in batches]
    for batch in batches[:2]:
        advance(first, batch, factor=0.9)
    assert first.save(tmp_path).parent == tmp_path
    resumed.load(tmp_path)
    assert [advance(resumed, batch, factor=0.9) for batch in batches[2:]] == rows[2:]
    assert torch.equal(resumed.values, whole.values)


def test_the_table_has_every_response_with_its_offset(tmp_path):
    offsets = make()
    advance(offsets, EVERYTHING)
    offsets.export(tmp_path)
    table = pl.read_parquet(tmp_path / "offsets.parquet")
    assert table["response_key"].to_list() == list(keys(0, M))
    assert table["offset"].dtype == pl.Float32 and table["offset"].to_list() == offsets.values.tolist()


def test_the_summary_is_what_the_constraint_says_of_the_final_offsets():
    offsets, gradients = make(weights="sides"), sketched()
    offsets.values.copy_(draw(M, seed=4))
    told = offsets.summary()
    for name, columns in (("penalty", gradients.sketches), ("penalty_audit", gradients.audit)):
        sums = sum(offsets.values[side] * columns[side] for side in SIDES.flatten()) / SIDES.numel()
        assert told[name] == pytest.approx(sums.square().sum().item(), rel=1e-5)
    columns = weighted(gradients) * offsets.values
    assert told["null_ratio"] == pytest.approx((told["penalty"] / columns.square().sum()).item(), rel=1e-5)
    assert (told["p00"], told["p50"]) == pytest.approx(tuple(np.quantile(offsets.values, [0, 0.5])), rel=1e-6)
    differences = offsets.values[SIDES[:, 0]] - offsets.values[SIDES[:, 1]]
    assert told["margins"] == pytest.approx(differences.mean().item(), rel=1e-5)
    assert told["norm"] == pytest.approx(offsets.values.norm().item(), rel=1e-6)


def test_the_null_ratio_is_one_for_orthogonal_gradients_and_zero_in_the_null_space():
    orthogonal = make(SketchedGradients(torch.eye(M), torch.eye(M), torch.ones(M)))
    orthogonal.values.copy_(draw(M, seed=4))
    assert orthogonal.summary()["null_ratio"] == pytest.approx(1, rel=1e-5)
    alike = make(SketchedGradients(torch.ones(M, 1), torch.ones(M, 1), torch.ones(M)))
    alike.values.copy_(torch.tensor([1.0, -1.0] * (M // 2)))
    assert alike.summary()["null_ratio"] == pytest.approx(0, abs=1e-10)
