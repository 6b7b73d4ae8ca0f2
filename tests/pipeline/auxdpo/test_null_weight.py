"""What null_weight counts in: it makes no difference in what unit gradients are, nor how many responses there are."""

import json

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import torch
from torch.autograd.functional import hessian
from torch.nn.functional import softplus

from cache import publish_reference
from cache.key_set import key_array
from pipeline.auxdpo.nullspace import Projection, SketchedGradients
from pipeline.auxdpo.offsets import Offsets, mean_squared_norm, penalty_unit, response_weights
from pipeline.auxdpo.rank_share import open_offsets
from pipeline.auxdpo.requirements import write_stamp
from pipeline.errors import RequestError
from pipeline.objectives.pair import PairLogps
from pipeline.params import AuxDPO
from tests.cache.test_sketches import IDENTITY, keys, make_rows
from tests.pipeline.auxdpo.test_nullspace import draw
from tests.pipeline.auxdpo.test_offsets import EVERYTHING, PAIRS, SIDES, M, advance, make, params, sketched
from tests.pipeline.auxdpo.test_rank_share import OneOf

STEPS = 40


def trained(gradients: SketchedGradients, **fields) -> tuple[torch.Tensor, list[dict[str, float]]]:
    """Offsets after some steps over all pairs, and their history."""
    offsets = make(gradients, offset_learning_rate=0.05, **fields)
    return offsets.values, [advance(offsets, EVERYTHING) for _ in range(STEPS)]


@pytest.mark.parametrize("fields", [{}, {"centred": True}, {"weights": "sides"}, {"constraint": "batch"}])
@pytest.mark.parametrize("scale", [2.0**-9, 1000.0])
def test_offsets_train_alike_whatever_unit_gradients_are_in(scale, fields):
    plain, history = trained(sketched(), null_weight=3.0, **fields)
    other, others = trained(sketched(scale), null_weight=3.0, **fields)
    torch.testing.assert_close(other, plain, rtol=1e-4, atol=1e-6)
    if scale == 2.0**-9:  # a power of two rounds nothing
        assert torch.equal(other, plain)
    name = "offsets/batch_penalty" if fields.get("constraint") == "batch" else "offsets/penalty"
    assert others[-1][name] == pytest.approx(scale**2 * history[-1][name], rel=1e-3)
    free, _ = trained(sketched(), null_weight=1e-6, **fields)
    assert (plain - free).abs().max() > 0.1  # the penalty does hold something


def test_the_absolute_weight_does_depend_on_it():
    plain, other = (trained(sketched(scale), null_weight_absolute=3.0)[0] for scale in (1.0, 30.0))
    assert (plain - other).abs().max() > 0.1


def copies(n: int) -> Offsets:
    """n times the same pairs, each time with responses, prompts and directions of gradients of their own."""
    columns = torch.block_diag(*[draw(M, 6)] * n)
    sides = torch.cat([SIDES + M * copy for copy in range(n)])
    return Offsets(
        key_array(keys(0, n * M)),
        torch.arange(n * M) % M % 2 + 2 * (torch.arange(n * M) // M),
        sides,
        SketchedGradients(columns, columns, torch.ones(n * M)),
        slice(0, n * M),
        params(null_weight=3.0, centred=True, offset_learning_rate=0.05),
        mean_square=columns.double().square().sum(dim=1).mean().item(),
        sum_over_ranks=lambda values: values,
    )


def test_offsets_of_a_pair_are_the_same_among_more_pairs_of_its_kind():
    """A mean over 3 m responses has a third of each one's gradient, and a sum of squares over them a ninth."""
    one, three = copies(1), copies(3)
    for offsets, n in ((one, 1), (three, 3)):
        pairs = np.arange(n * PAIRS)
        logps = PairLogps(*torch.full((4, len(pairs)), -5.0), *torch.ones(2, len(pairs)))
        for _ in range(STEPS):
            offsets.losses(logps, pairs, pairs)
            offsets.step(pairs, 1.0)
    assert one.values.abs().max() > 0.3
    torch.testing.assert_close(three.values, one.values.repeat(3), rtol=1e-3, atol=1e-4)
    assert three.null_weights.absolute == pytest.approx(3 * one.null_weights.absolute)


@pytest.mark.parametrize("weights", ["responses", "sides"])
def test_at_weight_one_penalty_and_loss_bend_alike_on_average_over_directions(weights):
    """By second derivatives, at offsets of zero and a policy at the reference."""
    columns, zero = draw(M, 6).double(), torch.zeros(M, dtype=torch.float64)
    w = response_weights(SIDES, M, params(weights=weights))
    unit = penalty_unit(w, mean_squared_norm(columns.norm(dim=1), w))

    def loss(delta):
        return softplus(delta[SIDES[:, 1]] - delta[SIDES[:, 0]]).mean()

    def penalty(delta):
        return unit * ((w * delta) @ columns).square().sum()

    assert hessian(penalty, zero).trace().item() == pytest.approx(hessian(loss, zero).trace().item(), rel=1e-6)
    if weights == "responses":
        assert unit == pytest.approx(M / (4 * columns.square().sum(dim=1).mean().item()), rel=1e-6)


def test_the_summary_tells_the_weight_in_effect_in_both_units():
    square = sketched().sketches.double().square().sum(dim=1).mean().item()
    told = make(null_weight=3.0).summary()
    assert (told["null_weight"], told["null_weight_absolute"]) == (3.0, pytest.approx(3 * M / (4 * square)))
    told = make(null_weight_absolute=3.0).summary()
    assert (told["null_weight"], told["null_weight_absolute"]) == (pytest.approx(3 * 4 * square / M), 3.0)
    nothing = make(constraint="projection", projection=Projection(sketched(), 4)).summary()
    assert not {"null_weight", "null_weight_absolute"} & nothing.keys()


def test_each_batch_has_its_unit_under_the_batch_constraint():
    offsets, square = make(constraint="batch", null_weight=3.0), sketched().sketches.square().sum(dim=1).mean()
    row = advance(offsets, np.array([0, 3, 4]))  # six responses
    assert row["offsets/null_weight_absolute"] == pytest.approx(3 * 6 / (4 * square.item()))
    assert "null_weight_absolute" not in offsets.summary()


# published norms ------------------------------------------------------------------------------------------------------


def publish(folder, norms) -> pl.DataFrame:
    """Sketches with these norms, and pairs of four of their six responses."""
    rows = make_rows(0, len(norms))
    rows = rows.set_column(1, rows.schema.field("grad_norm"), pa.array(norms, pa.float32()))
    publish_reference(folder, rows, IDENTITY)
    order = keys(0, len(norms))
    return pl.DataFrame({"chosen_key": [order[5], order[0]], "rejected_key": [order[1], order[2]]})


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("REFCACHE_HOME", str(tmp_path / "home"))


def opened(folder, pairs, **fields) -> Offsets:
    return open_offsets(folder, pairs, np.arange(len(pairs)), params(**fields), OneOf(0, 1, lambda x: x))


def test_the_unit_is_of_the_exact_norms_of_the_training_responses_alone(tmp_path):
    pairs = publish(tmp_path / "sketches", [1.0, 2.0, 3.0, 1e3, 1e4, 4.0])
    found = opened(tmp_path / "sketches", pairs, null_weight=2.0).null_weights.absolute
    assert found == pytest.approx(2 * 4 / (4 * (1 + 4 + 9 + 16) / 4))


def test_a_weight_without_unit_is_refused_and_an_absolute_one_is_not(tmp_path):
    pairs = publish(tmp_path / "sketches", [0.0] * 6)
    with pytest.raises(RequestError, match=r"zero for all 4 .* null_weight 2 has no unit.*`trainable`"):
        opened(tmp_path / "sketches", pairs, null_weight=2.0)
    assert opened(tmp_path / "sketches", pairs, null_weight_absolute=2.0).null_weights == (0.0, 2.0)


# the parameters -------------------------------------------------------------------------------------------------------


def auxdpo(**fields) -> AuxDPO:
    return AuxDPO(objective="auxdpo", **fields)


@pytest.mark.parametrize("fields", [{}, {"null_weight": 3.0}, {"null_weight_absolute": 3.0}])
def test_a_record_has_both_weights_and_is_read_as_it_was_meant(fields):
    """Also through JSON, as train.json and a run's settings go."""
    made = auxdpo(**fields)
    record = json.loads(json.dumps(made.hyperparameters()))
    assert {"null_weight", "null_weight_absolute"} <= record.keys()
    assert made == auxdpo(**record) == AuxDPO.from_record(record)
    assert (made.null_weight is None) != (made.null_weight_absolute is None)


def test_a_null_unsets_a_weight():
    assert auxdpo(null_weight=None, null_weight_absolute=3.0) == auxdpo(null_weight_absolute=3.0)
    assert auxdpo(null_weight=None) == auxdpo()


def test_a_record_from_before_the_absolute_weight_had_a_name_means_that_one():
    assert AuxDPO.from_record({"beta": 0.1, "null_weight": 3.0}) == auxdpo(null_weight_absolute=3.0)


def test_the_stamp_says_what_the_weight_counts_in(tmp_path):
    """So that a policy trained when the same number meant the absolute weight is trained anew."""
    publish(tmp_path / "sketches", [1.0] * 6)
    files = [tmp_path / name for name in ("relative.json", "absolute.json")]
    for file, fields in zip(files, ({"null_weight": 1.0}, {"null_weight_absolute": 1.0}), strict=True):
        write_stamp("aux", auxdpo(**fields), tmp_path / "sketches", file)
    relative, absolute = (json.loads(file.read_text()) for file in files)
    assert "mean ||g||^2" in relative.pop("null_weight") and relative == absolute
    assert absolute == {"variant": "aux", "sketches": relative["sketches"]}
