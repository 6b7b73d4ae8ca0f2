"""AuxDPO end to end: offsets train beside the policy, alike on any number of ranks, and outlive kills."""

import dataclasses
import math
import shutil

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch

from cache import CacheIncomplete, CacheMismatch, open_sketches, publish_reference
from pipeline.errors import RequestError
from pipeline.params import Lora, LoraShape, SketchParams, TrainParams
from pipeline.reference.sketching import sketch_responses
from pipeline.runs.policy import train_policy
from tests.integration.trainings import TRAIN, RanksEnded, inputs, outputs, without_speed
from tests.tiny import write_model, write_pairs, write_reference_cache

pytestmark = pytest.mark.slow

AUXDPO = {"variant": "auxdpo", "evaluate_every": 4, "evaluate_pairs": 11}
LORA = Lora(lora=LoraShape(r=2, alpha=8, targets=["q_proj", "v_proj"], blocks="last"))


@pytest.fixture(scope="module")
def sketched(phase_one, tmp_path_factory):
    """phase_one with the sketches of its training responses."""
    return with_sketches(phase_one, tmp_path_factory.mktemp("sketched"))


def with_sketches(phase_one, root, trainable="all", **params):
    for name in ("pairs", "model", "logps"):
        if not (root / name).exists():
            (root / name).symlink_to(phase_one / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REFCACHE_HOME", str(root / "home"))
        paths = {name: root / name for name in ("pairs", "model")}
        settings = SketchParams(**{"mode": "tensorsketch", "k": 64, "audit": 64} | params)
        sketch_responses(
            **paths, out=root / "sketches", metrics=root / "sketch.json", params=settings, trainable=trainable
        )
    return root


@pytest.fixture(scope="module")
def alone(nursery, sketched, tmp_path_factory):
    """Nine steps on one rank that nobody disturbs."""
    return nursery.train(sketched, tmp_path_factory.mktemp("alone"), **AUXDPO)


@pytest.fixture(scope="module")
def divided(nursery, sketched, tmp_path_factory):
    """The same on two ranks under ZeRO-3."""
    return nursery.train(sketched, tmp_path_factory.mktemp("divided"), **AUXDPO, ranks=2, zero_stage=3)


def test_offsets_train_from_zero_and_come_out_as_a_table_of_the_training_responses(alone, one_rank, sketched):
    first, last = alone.history[0], alone.history[-1]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-4)  # no offsets yet: DPO's first step
    assert (first["offsets/rms"], first["offsets/penalty"], first["offsets/share"]) == (0, 0, 0)
    assert first["rewards/margins"] == one_rank.history[0]["rewards/margins"]
    assert last["offsets/rms"] > 0.01 and last["offsets/penalty"] > 0 and 0 < last["offsets/share"] < 1
    assert last["loss"] < 0.9 * first["loss"]
    table, told = alone.offsets, alone.summary["offsets"]
    assert set(table["response_key"]) == open_sketches(sketched / "sketches", expect=None).keys()
    assert told["responses"] == len(table) == 54
    assert told["rms"] == pytest.approx((table["offset"].cast(pl.Float64) ** 2).mean() ** 0.5, rel=1e-6)
    assert {"penalty", "penalty_audit", "null_ratio", "norm", "p05", "p50", "p95"} <= told.keys()


def test_held_out_pairs_are_measured_without_offsets(alone, one_rank):
    assert [row.keys() for row in alone.evaluations] == [row.keys() for row in one_rank.evaluations]


def test_a_heavier_penalty_keeps_the_offsets_nearer_to_the_null_space(nursery, alone, sketched, tmp_path):
    """Also as the audit sketch sees it, to which nothing was fitted."""
    variants = {"auxdpo": TRAIN["variants"]["auxdpo"] | {"null_weight": 1e-3}}
    free = nursery.train(sketched, tmp_path, **AUXDPO, variants=variants).summary["offsets"]
    told = alone.summary["offsets"]
    for name in ("penalty", "penalty_audit"):
        assert told[name] < 0.2 * free[name], name
    direction, freely = (found["penalty"] / found["norm"] ** 2 for found in (told, free))
    assert direction < 0.8 * freely  # not by being smaller alone
    assert told["margins"] < 0.5 * free["margins"]


def test_gradients_in_another_unit_train_the_same_policy_and_offsets(nursery, alone, sketched, tmp_path):
    """Published sketches whose every number and norm is 64 times as large: a power of two, so that nothing rounds."""
    for name in ("pairs", "model", "logps"):
        (tmp_path / name).symlink_to(sketched / name)
    rows = pa.concat_tables(published_rows(sketched / "sketches"))
    for n, name in enumerate(rows.column_names):
        if name == "grad_norm" or name.endswith("_scale"):
            rows = rows.set_column(n, rows.schema.field(name), pc.multiply(rows[name], pa.scalar(64, pa.float32())))
    identity = open_sketches(sketched / "sketches", expect=None).identity
    publish_reference(tmp_path / "sketches", rows, identity)
    other = nursery.train(tmp_path, tmp_path / "out", **AUXDPO)
    assert other.offsets.equals(alone.offsets)
    assert all(torch.equal(other.weights[name], value) for name, value in alone.weights.items())
    for ours, theirs in zip(without_speed(other.history), without_speed(alone.history), strict=True):
        assert ours.pop("offsets/penalty") == pytest.approx(64**2 * theirs.pop("offsets/penalty"), rel=1e-6)
        assert ours == theirs
    ours, theirs = other.summary["offsets"], alone.summary["offsets"]
    assert ours["null_weight"] == theirs["null_weight"] == 200
    assert 64**2 * ours["null_weight_absolute"] == theirs["null_weight_absolute"]


def published_rows(folder):
    published = open_sketches(folder, expect=None)
    kind = published.identity.kind
    return [pl.DataFrame(table).to_arrow().cast(kind.schema) for table in published.tables(kind.schema.names)]


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_two_ranks_give_what_one_rank_gives(nursery, alone, divided, sketched, tmp_path, zero_stage):
    two = divided
    if zero_stage < 3:
        two = nursery.train(sketched, tmp_path, **AUXDPO, ranks=2, zero_stage=zero_stage, layout="padded")
    for ours, theirs in ((two.history, alone.history), (two.evaluations, alone.evaluations)):
        for row, reference in zip(without_speed(ours), without_speed(theirs), strict=True):
            assert row == pytest.approx(reference, abs=1e-4, rel=1e-3)
    assert two.offsets["response_key"].equals(alone.offsets["response_key"])
    assert two.offsets["offset"].to_list() == pytest.approx(alone.offsets["offset"].to_list(), abs=1e-4)
    for name, expected in alone.weights.items():
        torch.testing.assert_close(two.weights[name], expected, atol=1e-4, rtol=1e-3)
    assert two.summary["offsets"] == pytest.approx(alone.summary["offsets"], rel=1e-2, abs=1e-4)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_killed_run_ends_as_one_that_nobody_killed(nursery, alone, divided, sketched, tmp_path, ranks):
    whole, settings = (alone, AUXDPO) if ranks == 1 else (divided, AUXDPO | {"ranks": 2, "zero_stage": 3})
    for what, n in (("update", 4 * 3), ("row", 1)) if ranks == 1 else (("update", 4 * 2 + 1),):
        with pytest.raises(RanksEnded) as caught:
            nursery.train(sketched, tmp_path, moments=((ranks - 1, what, n),), **settings)
        assert caught.value.codes[ranks - 1] == -9, caught.value.said
    done = nursery.train(sketched, tmp_path, **settings)
    assert done.summary["resumed_from_step"] == 3
    assert done.equals(whole)


def test_a_lora_trains_on_exact_gradients_in_bf16_and_another_start_is_refused(nursery, phase_one, tmp_path):
    write_reference_cache(tmp_path / "logps", phase_one / "pairs", phase_one / "model", dtype="bfloat16")
    root = with_sketches(phase_one, tmp_path, trainable=LORA, mode="exact")
    settings = {"variant": "auxdpo", "trainable": LORA.model_dump(), "dtype": "bfloat16", "epochs": 0.5}
    variants = {"auxdpo": TRAIN["variants"]["auxdpo"] | {"constraint": "projection", "rank": 20}}
    done = nursery.train(root, tmp_path / "out", **settings, variants=variants)
    assert (done.out / "policy/adapter_config.json").exists() and done.summary["offsets"]["rms"] > 0
    published = open_sketches(root / "sketches", expect=None)
    (rows,) = published_rows(root / "sketches")
    publish_reference(root / "sketches", rows, dataclasses.replace(published.identity, adapter_init="0" * 32))
    with pytest.raises(RanksEnded, match="adapter_init: found 000000000000, expected") as caught:
        nursery.train(root, tmp_path / "other", **settings, variants=variants)
    assert caught.value.codes == [2]


class TestRefusals:
    """Before any model is loaded: no rank is started, so these take milliseconds."""

    @pytest.fixture(autouse=True)
    def own_workspace(self, tmp_path, monkeypatch):
        monkeypatch.setenv("REFCACHE_HOME", str(tmp_path / "work"))

    def train(self, root, out, *, trainable="all", **settings):
        cell = {"variant": "auxdpo", "seed": 0, "trainable": trainable}
        return train_policy(**cell, **inputs(root), **outputs(out), params=TrainParams.model_validate(TRAIN | settings))

    def test_no_sketches(self, phase_one, tmp_path):
        with pytest.raises(RequestError, match="--sketches"):
            self.train(phase_one, tmp_path)

    def test_sketches_of_another_trainable_or_model(self, sketched, tmp_path):
        with pytest.raises(CacheMismatch, match=r'trainable: found "all", expected "last_block"\n.*dvc repro sketch'):
            self.train(sketched, tmp_path, trainable="last_block")
        shutil.copytree(sketched, tmp_path / "other", symlinks=True)
        (tmp_path / "other/model").unlink()
        (tmp_path / "other/logps").unlink()
        write_model(tmp_path / "other/model", seed=1)
        write_reference_cache(tmp_path / "other/logps", sketched / "pairs", tmp_path / "other/model")
        with pytest.raises(CacheMismatch, match=r"weights: found .*, expected .*\n.*dvc repro sketch"):
            self.train(tmp_path / "other", tmp_path)

    def test_a_response_that_is_not_sketched(self, sketched, tmp_path):
        shutil.copytree(sketched, tmp_path / "other", symlinks=True)
        for name in ("pairs", "logps"):
            (tmp_path / "other" / name).unlink()
        write_pairs(tmp_path / "other/pairs", 26)
        write_reference_cache(tmp_path / "other/logps", tmp_path / "other/pairs", sketched / "model")
        with pytest.raises(CacheIncomplete, match=r"sketches lacks \d+ of the .*dvc repro sketch"):
            self.train(tmp_path / "other", tmp_path)

    def test_a_projection_that_leaves_only_zero(self, sketched, tmp_path):
        variants = {"auxdpo": TRAIN["variants"]["auxdpo"] | {"constraint": "projection", "rank": 54}}
        with pytest.raises(RequestError, match="only 54 responses"):
            self.train(sketched, tmp_path, variants=variants)
