"""Training for real, under DeepSpeed's launcher: the step-0 invariant, layouts, resume, refusals."""

import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cache import CacheIncomplete, CacheMismatch, open_reference
from pipeline.batches import batch_indices
from pipeline.drift import ensure_drift
from pipeline.errors import RequestError, RunFailed
from pipeline.memory_plan import PROGRAM_BYTES, plan_memory
from pipeline.params import Params, TrainParams
from pipeline.preference_training import train_policy
from pipeline.prepared_data import read_pairs, scan_responses
from pipeline.sft import fine_tune
from tests.tiny import (
    TINY_MODEL,
    shift_row,
    write_model,
    write_pairs,
    write_reference_cache,
    write_sft,
    write_tokenizer,
)

pytestmark = pytest.mark.slow

TRAIN = {
    "epochs": 2.0,
    "batch_size": 8,
    "micro_batch_size": 3,
    "learning_rate": 3e-3,
    "checkpoint_every": 3,
    "variants": {"dpo": {"objective": "dpo", "beta": 0.5}, "bdpo": {"objective": "bdpo", "beta": 0.5, "mixture": 0.3}},
}


@pytest.fixture(scope="module")
def phase_one(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("phase-one")
    model, pairs = write_model(root / "model"), write_pairs(root / "pairs", 24)
    write_reference_cache(root / "logps", pairs, model)
    return root


@pytest.fixture(autouse=True)
def own_workspace(tmp_path, monkeypatch):
    monkeypatch.setenv("REFCACHE_HOME", str(tmp_path / "work"))


def train(root: Path, out: Path, *, variant: str = "dpo", seed: int = 0, trainable="all", **settings):
    """Run one cell; returns train.json's content and the history."""
    summary = train_policy(
        variant=variant,
        seed=seed,
        pairs=root / "pairs",
        model=root / "model",
        reference=root / "logps",
        out=out / "policy",
        history=out / "history.tsv",
        metrics=out / "train.json",
        params=TrainParams.model_validate(TRAIN | settings),
        trainable=trainable,
    )
    return summary, read_history(out / "history.tsv")


def measure_drift(root: Path, sample_size: int) -> dict:
    return ensure_drift(
        root / "logps",
        root / "model",
        responses=scan_responses(root / "pairs"),
        pairs=read_pairs(root / "pairs"),
        reference=open_reference(root / "logps", expect=None),
        trainer_dtype="float32",
        sample_size=sample_size,
        trust_remote_code=False,
    )


def read_history(path: Path) -> list[dict[str, float]]:
    with path.open() as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file, delimiter="\t")]


def without_speed(history: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in row.items() if name != "tokens_per_second"} for row in history]


@pytest.fixture(scope="module")
def one_rank(phase_one, tmp_path_factory):
    out = tmp_path_factory.mktemp("one-rank")
    os.environ["REFCACHE_HOME"] = str(out / "work")
    return *train(phase_one, out), out


def test_the_first_loss_from_the_references_own_weights_is_log_two(one_rank):
    _, history, _ = one_rank
    assert history[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert abs(history[0]["rewards/margins"]) < 1e-4


def test_a_row_that_is_off_by_a_nat_outside_the_drift_sample_stops_the_run_before_its_first_row_of_history(
    phase_one, tmp_path
):
    shutil.copytree(phase_one, tmp_path / "other")
    pairs = read_pairs(phase_one / "pairs", "train")
    first = batch_indices(0, seed=0, n_examples=len(pairs), batch_size=8)
    off = pairs.row(int(first[5]), named=True)
    shift_row(tmp_path / "other/logps", off["rejected_key"], 1.0)
    with pytest.raises(RunFailed, match=f"1 nats in the rejected response of {off['source']}, .*--drift --repair"):
        train(tmp_path / "other", tmp_path)
    assert not (tmp_path / "policy").exists()
    assert not any(len(file.read_text()) for file in tmp_path.glob("work/training/*/history.tsv"))


def test_training_moves_margins_and_saves_a_whole_model_with_tokenizer(one_rank, phase_one):
    summary, history, out = one_rank
    assert len(history) == summary["steps"] == math.ceil(2 * 36 / 8)
    assert history[-1]["loss"] < 0.9 * history[0]["loss"] and history[-1]["rewards/accuracies"] > 0.8
    assert json.loads((out / "train.json").read_text())["pairs"] == 36  # the test pairs stay out
    from transformers import AutoModelForCausalLM, AutoTokenizer

    policy, start = load_file(out / "policy/model.safetensors"), load_file(phase_one / "model/model.safetensors")
    assert policy.keys() == start.keys()
    assert all((policy[name] != start[name]).any() for name in policy)
    AutoModelForCausalLM.from_pretrained(out / "policy")
    assert AutoTokenizer.from_pretrained(out / "policy").convert_tokens_to_ids("w7") == 7


@pytest.mark.parametrize(
    ("zero_stage", "settings"),
    [
        (0, {"layout": "padded"}),
        # 80 tokens: one to four micro-batches a step, and a number that differs between the ranks' own needs.
        (2, {"layout": "shared_prompts", "tokens_per_batch": 80}),
        (3, {"layout": "packed", "tokens_per_batch": 80}),
    ],
)
def test_two_ranks_and_every_layout_give_the_history_of_one_rank(one_rank, phase_one, tmp_path, zero_stage, settings):
    summary, expected, whole = one_rank
    assert summary["layout"] == "shared_prompts"
    summary, history = train(phase_one, tmp_path, ranks=2, zero_stage=zero_stage, **settings)
    assert summary["layout"] == settings["layout"]
    assert len(history) == len(expected)
    for row, reference in zip(without_speed(history), without_speed(expected), strict=True):
        assert row == pytest.approx(reference, abs=1e-4, rel=1e-4)
    ours, theirs = (load_file(out / "policy/model.safetensors") for out in (tmp_path, whole))
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-4, rtol=1e-3)


def command(root: Path, out: Path, params: Path) -> list[str]:
    paths = {"pairs": root / "pairs", "model": root / "model", "reference": root / "logps", "out": out / "policy"}
    paths |= {"history": out / "history.tsv", "metrics": out / "train.json", "params": params}
    options = [word for name, path in paths.items() for word in (f"--{name}", str(path))]
    return [sys.executable, "-m", "stages", "train", "--variant", "dpo", "--seed", "0", *options]


def params_file(path: Path) -> Path:
    """A whole params.yaml around TRAIN; JSON is YAML."""
    whole = {"model": {"name": "unused"}, "prepare": {}, "sft": {}, "score": {}, "trainable": "all", "train": TRAIN}
    whole |= {"sweep": {"variants": ["dpo"], "seeds": [0]}, "evaluate": {}}
    Params.model_validate(whole)
    path.write_text(json.dumps(whole))
    return path


def test_a_run_killed_after_a_checkpoint_resumes_to_the_uninterrupted_result(one_rank, phase_one, tmp_path):
    _, expected, whole = one_rank
    stage = subprocess.Popen(command(phase_one, tmp_path, params_file(tmp_path / "params.yaml")))
    work = tmp_path / "work" / "training"
    deadline = time.monotonic() + 120
    while not list(work.glob("*/checkpoints/step-00000003.complete")):
        assert stage.poll() is None and time.monotonic() < deadline, "ended before its first checkpoint"
        time.sleep(0.01)
    ranks = [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if is_rank(pid, work)]
    assert ranks
    stage.send_signal(signal.SIGKILL)
    stage.wait()
    while any(is_rank(pid, work) for pid in ranks):
        assert time.monotonic() < deadline, "an orphaned rank trains on"
        time.sleep(0.05)
    assert not (tmp_path / "policy").exists()

    summary, history = train(phase_one, tmp_path)
    assert summary["resumed_from_step"] in (3, 6)
    assert without_speed(history) == without_speed(expected)
    ours, theirs = (load_file(out / "policy/model.safetensors") for out in (tmp_path, whole))
    assert all((ours[name] == theirs[name]).all() for name in theirs)
    assert not list(work.iterdir())  # checkpoints go when the run is published


def is_rank(pid: int, work: Path) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes()
        return b"pipeline.worker" in words and str(work).encode() in words and b"launcher" not in words
    except OSError:
        return False


def test_bf16_lora_checkpointing_and_bdpo_run_together_and_publish_an_adapter(phase_one, tmp_path):
    write_reference_cache(tmp_path / "logps", phase_one / "pairs", phase_one / "model", dtype="bfloat16")
    for name in ("pairs", "model"):
        (tmp_path / name).symlink_to(phase_one / name)
    lora = {"lora": {"r": 4, "alpha": 8, "targets": ["q_proj", "v_proj"]}}
    params = Params.model_validate(json.loads(params_file(tmp_path / "p.json").read_text()) | {"trainable": lora})
    summary, history = train(
        tmp_path,
        tmp_path,
        variant="bdpo",
        trainable=params.trainable,
        dtype="bfloat16",
        activation_checkpointing=True,
        learning_rate=3e-2,
    )
    assert summary["objective"] == "bdpo"
    assert history[0]["loss"] == pytest.approx(math.log(2), abs=0.05)  # bf16 rounding of a sequence, times beta
    assert history[-1]["loss"] < history[0]["loss"]
    assert (tmp_path / "policy/adapter_config.json").exists()
    assert all("lora_" in name for name in load_file(tmp_path / "policy/adapter_model.safetensors"))


def test_frozen_parameters_come_out_as_they_went_in_under_zero_three(phase_one, tmp_path):
    train(phase_one, tmp_path, trainable="last_block", ranks=2, zero_stage=3)
    before, after = (load_file(f / "model.safetensors") for f in (phase_one / "model", tmp_path / "policy"))
    changed = {name for name in before if (before[name] != after[name]).any()}
    assert changed == {name for name in before if ".layers.1." in name}


def test_a_diverging_run_stops_at_once_naming_the_step(phase_one, tmp_path):
    with pytest.raises(RunFailed, match=r"at step \d+ .*lower the learning rate"):
        train(phase_one, tmp_path, learning_rate=1e30)


def test_sft_learns_from_scratch_and_reports_the_gradient_norm(tmp_path):
    from pipeline.params import ModelParams, SftParams

    rows, tokenizer = write_sft(tmp_path / "sft.parquet", 40), write_tokenizer(tmp_path / "tokenizer")
    fine_tune(
        sft=rows,
        tokenizer=tokenizer,
        out=tmp_path / "reference",
        history=tmp_path / "h.tsv",
        metrics=tmp_path / "m.json",
        params=SftParams(epochs=8, batch_size=8, micro_batch_size=8, learning_rate=1e-2),
        model=ModelParams.model_validate({"scratch": {"config": TINY_MODEL}}),
    )
    history = read_history(tmp_path / "h.tsv")
    assert history[0]["loss"] == pytest.approx(
        math.log(64), abs=0.3
    )  # a random model is near uniform over its vocabulary
    assert history[-1]["loss"] < history[0]["loss"] - 0.3
    assert all(row["grad_norm"] > 0 for row in history)


def test_peak_memory_is_what_the_dry_run_says(tmp_path):
    """Within 20 %, program included; of what comes on top of the program within 35 %."""
    pairs = write_pairs(tmp_path / "pairs", 200, test_share=0.0)
    # Many narrow layers: much to keep for little arithmetic.
    shape = {"vocab_size": 30_000, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 12}
    model = write_model(tmp_path / "model", **shape)
    write_reference_cache(tmp_path / "logps", pairs, model)
    settings = {"batch_size": 200, "micro_batch_size": 200, "epochs": 1.0, "learning_rate": 1e-5}
    plan = plan_memory(model, pairs, TrainParams.model_validate(TRAIN | settings), "all")
    summary, _ = train(tmp_path, tmp_path, **settings)
    assert plan.total == pytest.approx(summary["peak_bytes"], rel=0.2)
    assert plan.total - PROGRAM_BYTES == pytest.approx(summary["peak_bytes"] - PROGRAM_BYTES, rel=0.35)


def test_fifty_steps_have_the_losses_of_trls_dpo_on_the_same_batches(tmp_path):
    pytest.importorskip("trl")
    pairs, model = write_pairs(tmp_path / "pairs", 12, test_share=0.0), write_model(tmp_path / "model")
    write_reference_cache(tmp_path / "logps", pairs, model)
    settings = {"schedule": "constant", "warmup_share": 0.0, "learning_rate": 1e-3, "batch_size": 4}
    summary, history = train(tmp_path, tmp_path, epochs=50 * 4 / 24, **settings)
    assert summary["steps"] == 50
    peer = [sys.executable, "benchmarks/train_peers.py", "precompute", "--out", str(tmp_path / "trl.json")]
    peer += ["--pairs", str(pairs), "--model", str(model), "--dtype", "float32", "--batch-size", "4", "--steps", "50"]
    peer += ["--micro-batch-sizes", "2", "--learning-rate", "1e-3", "--beta", "0.5"]
    root = Path(__file__).parents[2]
    subprocess.run(peer, cwd=root, env=os.environ | {"PYTHONPATH": str(root)}, check=True, capture_output=True)
    losses = json.loads((tmp_path / "trl.json").read_text())["loss"]
    assert [row["loss"] for row in history] == pytest.approx(losses, abs=1e-3)
    assert losses[-1] < 0.8 * losses[0]  # else equal losses say little


class TestRefusals:
    """Before any model is loaded: no launcher is started, so these take milliseconds."""

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
