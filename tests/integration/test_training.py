"""What training does: the step-0 invariant, layouts, objectives and dtypes, guard rails, held-out pairs, refusals.

The ranks are forks that find themselves started as under torchrun (rank_nursery.py). How ranks are started for real is
in test_launching.py; kills are there and in test_resume.py.
"""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from safetensors.torch import load_file

from cache import CacheIncomplete, CacheMismatch, open_reference
from pipeline.data.tables import pair_sides, read_pairs, scan_responses
from pipeline.errors import RequestError
from pipeline.params import TrainParams
from pipeline.reference.drift import ensure_drift
from pipeline.runs.memory_plan import PROGRAM_BYTES, plan_memory
from pipeline.runs.policy import train_policy
from pipeline.training.batches import batch_indices
from tests import ROOT
from tests.integration.trainings import TRAIN, RanksEnded, inputs, outputs, read_table, without_speed
from tests.scoring_project import open_responses
from tests.tiny import (
    shift_row,
    write_model,
    write_pairs,
    write_reference_cache,
)

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def own_workspace(tmp_path, monkeypatch):
    monkeypatch.setenv("REFCACHE_HOME", str(tmp_path / "work"))


def test_the_first_loss_from_the_references_own_weights_is_log_two(one_rank):
    assert one_rank.history[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert abs(one_rank.history[0]["rewards/margins"]) < 1e-4


def test_a_row_that_is_off_by_a_nat_outside_the_drift_sample_stops_the_run_before_its_first_row_of_history(
    nursery, phase_one, tmp_path
):
    shutil.copytree(phase_one, tmp_path / "other")
    pairs = read_pairs(phase_one / "pairs", "train")
    first = batch_indices(0, seed=0, n_examples=len(pairs), batch_size=8)
    off = pairs.row(int(first[5]), named=True)
    shift_row(tmp_path / "other/logps", off["rejected_key"], 1.0)
    with pytest.raises(RanksEnded, match=rf"1 nats in the rejected response of {off['source']}, .*--drift --repair"):
        nursery.train(tmp_path / "other", tmp_path)
    assert not (tmp_path / "policy").exists()
    assert not any(len(file.read_text()) for file in tmp_path.glob("work/training/*/history.tsv"))


def test_training_moves_margins_and_saves_a_whole_model_with_tokenizer(one_rank, phase_one):
    history = one_rank.history
    assert len(history) == one_rank.summary["steps"] == math.ceil(2 * 36 / 8)
    assert history[-1]["loss"] < 0.9 * history[0]["loss"] and history[-1]["rewards/accuracies"] > 0.8
    assert one_rank.summary["pairs"] == 36  # the test pairs stay out
    from transformers import AutoModelForCausalLM, AutoTokenizer

    policy, start = one_rank.weights, load_file(phase_one / "model/model.safetensors")
    assert policy.keys() == start.keys()
    assert all((policy[name] != start[name]).any() for name in policy)
    AutoModelForCausalLM.from_pretrained(one_rank.out / "policy")
    assert AutoTokenizer.from_pretrained(one_rank.out / "policy").convert_tokens_to_ids("w7") == 7


@pytest.mark.parametrize(
    ("zero_stage", "settings"),
    [
        (0, {"layout": "padded"}),
        # 80 tokens: one to four micro-batches a step, and a number that differs between the ranks' own needs.
        (2, {"layout": "shared_prompts", "tokens_per_batch": 80}),
        (3, {"layout": "packed", "tokens_per_batch": 80}),
    ],
)
def test_two_ranks_and_every_layout_give_the_history_of_one_rank(
    nursery, one_rank, phase_one, tmp_path, zero_stage, settings
):
    assert one_rank.summary["layout"] == "shared_prompts"
    two = nursery.train(
        phase_one, tmp_path, ranks=2, zero_stage=zero_stage, evaluate_every=4, evaluate_pairs=11, **settings
    )
    assert two.summary["layout"] == settings["layout"]
    assert {"attention", "layer_kernels"} <= two.summary.keys()  # what they are depends on the device
    for ours, theirs in ((two.history, one_rank.history), (two.evaluations, one_rank.evaluations)):
        assert len(ours) == len(theirs)
        for row, reference in zip(without_speed(ours), without_speed(theirs), strict=True):
            assert row == pytest.approx(reference, abs=1e-4, rel=1e-4)
    weights = two.weights
    for name, expected in one_rank.weights.items():
        torch.testing.assert_close(weights[name], expected, atol=1e-4, rtol=1e-3)


class TestHeldOutPairs:
    def test_they_are_measured_every_few_steps_and_at_the_end(self, one_rank):
        assert [row["step"] for row in one_rank.evaluations] == [4, 8, 9]
        assert one_rank.evaluations[-1].keys() == one_rank.history[-1].keys() - {
            "epoch",
            "grad_norm",
            "lr",
            "tokens_per_second",
        }

    def test_the_last_row_is_what_the_finished_policy_gives_them(self, one_rank, phase_one):
        """With transformers' own forward of the policy, and the reference cache."""
        from pipeline.data.splitting import held_out_rows
        from tests.tiny import plain_logps

        test = read_pairs(phase_one / "pairs", "test")
        rows = held_out_rows(len(test), 11).tolist()
        assert len(rows) == 11 < len(test)
        responses = {row["response_key"]: row for row in scan_responses(phase_one / "pairs").collect().to_dicts()}
        logps = open_reference(phase_one / "logps", expect=None).scan().select("response_key", "sum_logp").collect()
        cached = dict(logps.iter_rows())
        policy = one_rank.out / "policy"

        def reward(key):
            row = responses[key]
            return 0.5 * (sum(plain_logps(policy, row["prompt_ids"], row["response_ids"])) - cached[key])

        rewards = [[reward(test[side][row]) for side in ("chosen_key", "rejected_key")] for row in rows]
        last = one_rank.evaluations[-1]
        assert last["rewards/margins"] == pytest.approx(sum(c - r for c, r in rewards) / 11, abs=1e-4)
        assert last["loss"] == pytest.approx(sum(math.log1p(math.exp(r - c)) for c, r in rewards) / 11, abs=1e-4)
        assert last["dcr"] == pytest.approx(sum(c < 0 for c, _ in rewards) / 11)

    def test_measuring_does_not_change_the_training(self, nursery, one_rank, phase_one, tmp_path):
        without = nursery.train(phase_one, tmp_path, checkpoint_every=100)
        assert without_speed(without.history) == without_speed(one_rank.history)
        assert all((without.weights[name] == value).all() for name, value in one_rank.weights.items())
        assert (tmp_path / "evaluations.tsv").read_text() == "step\n"


def test_bf16_lora_checkpointing_and_bdpo_run_together_and_publish_an_adapter(nursery, phase_one, tmp_path):
    write_reference_cache(tmp_path / "logps", phase_one / "pairs", phase_one / "model", dtype="bfloat16")
    for name in ("pairs", "model"):
        (tmp_path / name).symlink_to(phase_one / name)
    done = nursery.train(
        tmp_path,
        tmp_path,
        variant="bdpo",
        trainable={"lora": {"r": 4, "alpha": 8, "targets": ["q_proj", "v_proj"]}},
        dtype="bfloat16",
        activation_checkpointing=True,
        learning_rate=3e-2,
    )
    assert done.summary["objective"] == "bdpo"
    assert done.history[0]["loss"] == pytest.approx(math.log(2), abs=0.05)  # bf16 rounding of a sequence, times beta
    assert done.history[-1]["loss"] < done.history[0]["loss"]
    assert (tmp_path / "policy/adapter_config.json").exists()
    assert all("lora_" in name for name in done.weights)


def test_frozen_parameters_come_out_as_they_went_in_under_zero_three(nursery, phase_one, tmp_path):
    after = nursery.train(phase_one, tmp_path, trainable="last_block", ranks=2, zero_stage=3).weights
    before = load_file(phase_one / "model/model.safetensors")
    changed = {name for name in before if (before[name] != after[name]).any()}
    assert changed == {name for name in before if ".layers.1." in name}


def names(root: Path, numbers) -> list[str]:
    pairs = read_pairs(root / "pairs", "train")
    return [f"pair {pairs['pair_id'][int(n)]} ({pairs['source'][int(n)]})" for n in numbers]


class TestDivergence:
    def test_a_diverging_run_stops_at_once_naming_step_pairs_and_the_last_good_checkpoint(
        self, nursery, phase_one, tmp_path
    ):
        with pytest.raises(RanksEnded) as caught:
            nursery.train(phase_one, tmp_path, learning_rate=1e30, checkpoint_every=1)
        assert caught.value.codes == [1]
        [named] = re.findall(
            r"at step 2, training on (.*?)\. The last good checkpoint is \S*step-0*1\.", caught.value.said
        )
        second = batch_indices(1, seed=0, n_examples=36, batch_size=8)
        assert set(re.findall(r"pair \d+ \(tiny\.jsonl:\d+\)", named)) == set(names(phase_one, second))
        assert "lower the learning rate" in caught.value.said

    @pytest.mark.parametrize("ranks", [1, 2])
    def test_a_nan_names_the_pairs_of_its_micro_batch_only(self, nursery, phase_one, tmp_path, ranks):
        batch = batch_indices(1, seed=0, n_examples=36, batch_size=8)
        [bad] = names(phase_one, batch[3:4])
        with pytest.raises(RanksEnded) as caught:
            nursery.train(phase_one, tmp_path, ranks=ranks, nan_pair=int(batch[3]))
        assert "loss nan" in caught.value.said and "at step 2" in caught.value.said
        named = set(re.findall(r"pair \d+ \(tiny\.jsonl:\d+\)", caught.value.said))
        assert bad in named and named < set(names(phase_one, batch)) and len(named) <= 3
        assert "There is no checkpoint yet" in caught.value.said
        [history] = tmp_path.glob("work/training/*/history.tsv")
        assert [row["step"] for row in read_table(history)] == [1]


def test_fifty_steps_have_the_losses_of_trls_dpo_on_the_same_batches(nursery, tmp_path):
    pytest.importorskip("trl")
    pairs, model = write_pairs(tmp_path / "pairs", 12, test_share=0.0), write_model(tmp_path / "model")
    write_reference_cache(tmp_path / "logps", pairs, model)
    settings = {"schedule": "constant", "warmup_share": 0.0, "learning_rate": 1e-3, "batch_size": 4}
    history = nursery.train(tmp_path, tmp_path, epochs=50 * 4 / 24, **settings).history
    assert len(history) == 50
    peer = [sys.executable, "benchmarks/train_peers.py", "precompute", "--out", str(tmp_path / "trl.json")]
    peer += ["--pairs", str(pairs), "--model", str(model), "--dtype", "float32", "--batch-size", "4", "--steps", "50"]
    peer += ["--micro-batch-sizes", "2", "--learning-rate", "1e-3", "--beta", "0.5"]
    subprocess.run(peer, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True, capture_output=True)
    losses = json.loads((tmp_path / "trl.json").read_text())["loss"]
    assert [row["loss"] for row in history] == pytest.approx(losses, abs=1e-3)
    assert losses[-1] < 0.8 * losses[0]  # else equal losses say little


def test_peak_memory_is_what_the_dry_run_says(tmp_path):
    """Within 20 %, program included; of what comes on top of the program within 35 %. The rank is no fork, which would
    count what it shares with its parent."""
    pairs = write_pairs(tmp_path / "pairs", 200, test_share=0.0)
    # Many narrow layers: much to keep for little arithmetic.
    shape = {"vocab_size": 30_000, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 12}
    model = write_model(tmp_path / "model", **shape)
    write_reference_cache(tmp_path / "logps", pairs, model)
    settings = {"batch_size": 200, "micro_batch_size": 200, "epochs": 1.0, "learning_rate": 1e-5}
    plan = plan_memory(model, pairs, TrainParams.model_validate(TRAIN | settings), "all")
    summary = train(tmp_path, tmp_path, **settings)
    assert plan.total == pytest.approx(summary["peak_bytes"], rel=0.2)
    assert plan.total - PROGRAM_BYTES == pytest.approx(summary["peak_bytes"] - PROGRAM_BYTES, rel=0.35)


def test_no_array_of_the_models_size_is_held_beside_weights_one_gradient_and_moments(tmp_path):
    """The embeddings are most of it: 146 MiB. What the kernel maps of the program's files varies by 50 with its cache.

    Two micro-batches and two steps, so that gradients meet others, and moments and a checkpoint the next forward.
    """
    pairs = write_pairs(tmp_path / "pairs", 8, test_share=0.0)
    shape = {"vocab_size": 300_000, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 12}
    model = write_model(tmp_path / "model", **shape)
    write_reference_cache(tmp_path / "logps", pairs, model)
    settings = {"batch_size": 8, "micro_batch_size": 4, "epochs": 1.0, "learning_rate": 1e-5, "checkpoint_every": 1}
    plan = plan_memory(model, pairs, TrainParams.model_validate(TRAIN | settings), "all")
    summary = train(tmp_path, tmp_path, **settings)
    assert plan.total == pytest.approx(summary["peak_bytes"], abs=125 << 20)


def train(root: Path, out: Path, *, variant: str = "dpo", **settings):
    """Run one cell with this process as the stage."""
    cell = {"variant": variant, "seed": 0, "trainable": "all"}
    return train_policy(**cell, **inputs(root), **outputs(out), params=TrainParams.model_validate(TRAIN | settings))


def measure_drift(root: Path, sample_size: int) -> dict:
    with TemporaryDirectory() as scratch:
        return ensure_drift(
            root / "logps",
            root / "model",
            responses=open_responses(root / "pairs", Path(scratch)),
            pairs=pair_sides(root / "pairs"),
            reference=open_reference(root / "logps", expect=None),
            trainer_dtype="float32",
            sample_size=sample_size,
            trust_remote_code=False,
        )


class TestRefusals:
    """Before any model is loaded: no rank is started, so these take milliseconds."""

    def test_other_weights(self, phase_one, tmp_path):
        shutil.copytree(phase_one, tmp_path / "other")
        write_model(tmp_path / "other/model", seed=1)
        with pytest.raises(CacheMismatch, match="weights"):
            train(tmp_path / "other", tmp_path)

    def test_a_missing_row(self, phase_one, tmp_path):
        shutil.copytree(phase_one, tmp_path / "other")
        write_pairs(tmp_path / "other/pairs", 30, seed=5)
        with pytest.raises(CacheIncomplete, match="dvc repro score"):
            train(tmp_path / "other", tmp_path)

    def test_too_much_drift_or_drift_of_another_dtype(self, phase_one, tmp_path):
        shutil.copytree(phase_one, tmp_path / "other")
        (tmp_path / "other/logps/drift.json").write_text('{"trainer_dtype": "float32", "per_sequence": {"p99": 0.3}}')
        with pytest.raises(RequestError, match=r"0\.3 nats.*drift_tolerance allows 0\.25.*logps --drift --repair"):
            train(tmp_path / "other", tmp_path)
        with pytest.raises(RequestError, match="measured against a trainer in float32"):
            train(phase_one, tmp_path, dtype="bfloat16")

    def test_drift_that_was_measured_names_how_many_sampled_rows_are_off(self, phase_one, tmp_path):
        shutil.copytree(phase_one, tmp_path / "other")
        logps = tmp_path / "other/logps"
        sampled = [row["response_key"] for row in measure_drift(tmp_path / "other", 8)["sequences"]]
        for key in sampled[:2]:
            shift_row(logps, bytes.fromhex(key), 1.0)
        with pytest.raises(RequestError, match="measured on other values"):
            train(tmp_path / "other", tmp_path)
        measure_drift(tmp_path / "other", 8)
        with pytest.raises(RequestError, match=r"allows 0\.25, 2 of 8 sampled rows above it"):
            train(tmp_path / "other", tmp_path)

    def test_an_unknown_variant(self, phase_one, tmp_path):
        with pytest.raises(RequestError, match=r"'ipo' is not in train\.variants"):
            train(phase_one, tmp_path, variant="ipo")

    def test_settings_without_a_single_step(self, phase_one, tmp_path):
        with pytest.raises(RequestError, match=r"36 examples are fewer than one batch .*at least 0\.222"):
            train(phase_one, tmp_path, epochs=0.1)

    def test_an_empty_split(self, phase_one, tmp_path):
        for name in ("model", "logps"):
            (tmp_path / name).symlink_to(phase_one / name)
        write_pairs(tmp_path / "pairs", 24, test_share=1.0)
        with pytest.raises(RequestError, match=r"no training pairs.*test_share"):
            train(tmp_path, tmp_path)
        write_pairs(tmp_path / "pairs", 24, test_share=0.0)
        with pytest.raises(RequestError, match=r"evaluate_every is 5, but .* holds no pair out"):
            train(tmp_path, tmp_path, evaluate_every=5)

    def test_a_held_out_pair_without_its_reference_value(self, phase_one, tmp_path):
        """Training alone doesn't need it."""
        for name in ("model", "pairs"):
            (tmp_path / name).symlink_to(phase_one / name)
        write_reference_cache(tmp_path / "logps", phase_one / "pairs", phase_one / "model", splits=("train",))
        with pytest.raises(CacheIncomplete, match="dvc repro score"):
            train(tmp_path, tmp_path, evaluate_every=5)

    def test_a_tracker_that_is_not_installed(self, phase_one, tmp_path, monkeypatch):
        monkeypatch.setattr("pipeline.training.trackers.find_spec", lambda name: None)
        with pytest.raises(RequestError, match="pip install tensorboard wandb"):
            train(phase_one, tmp_path, log_to=["tensorboard", "wandb"])
