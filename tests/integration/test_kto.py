"""KTO on unpaired feedback from prepare to the policy: what it learns, and its loss against plain transformers."""

import random

import numpy as np
import polars as pl
import pytest

from pipeline.data.tables import read_responses
from pipeline.errors import RequestError
from pipeline.params import ModelParams, TrainParams
from pipeline.runs.memory_plan import plan_memory
from pipeline.runs.policy import train_policy
from tests.integration.trainings import TRAIN, inputs, outputs
from tests.pipeline.data.preparing import file_params, prepare_into, write_jsonl
from tests.tiny import plain_logps, write_model, write_reference_cache

pytestmark = pytest.mark.slow
BETA, WEIGHTS = 0.5, {True: 1.0, False: 1.5}
KTO = {"objective": "kto", "beta": BETA, "undesirable_weight": WEIGHTS[False]}
SETTINGS = {"variants": {"kto": KTO}, "batch_size": 24, "micro_batch_size": 24}


def words(draw: random.Random, count: int) -> str:
    return " ".join(f"w{draw.randrange(3, 64)}" for _ in range(count))


@pytest.fixture(scope="module")
def feedback(tmp_path_factory):
    """Phase 1 of 60 labelled completions over 40 prompts."""
    root, draw = tmp_path_factory.mktemp("feedback"), random.Random(0)
    model = write_model(root / "model")
    prompts = [words(draw, draw.randrange(2, 8)) for _ in range(40)]
    rows = [
        {"prompt": prompt, "completion": words(draw, draw.randrange(1, 9)), "label": n % 2 == 0}
        for n, prompt in enumerate([*prompts, *prompts[:20]])
    ]
    write_jsonl(root / "in/pairs.jsonl", rows)
    params = file_params(root / "in", sft={"source": "none"}, test_share=0.25)
    prepare_into(root, params, ModelParams(name=str(model)))
    write_reference_cache(root / "logps", root / "pairs", model)
    return root


@pytest.fixture(scope="module")
def trained(nursery, feedback, tmp_path_factory):
    return nursery.train(
        feedback, tmp_path_factory.mktemp("kto"), variant="kto", evaluate_every=100, epochs=6.0, **SETTINGS
    )


def test_the_first_loss_is_half_of_each_rows_weight_and_training_parts_the_two_kinds(trained, feedback):
    rows = pl.read_parquet(feedback / "pairs/feedback.parquet").filter(split="train")
    assert trained.summary["pairs"] == len(rows)
    first, last = trained.history[0], trained.history[-1]
    assert 0.5 < first["loss"] < 0.75 and first["kl"] == pytest.approx(0, abs=1e-4)
    assert last["rewards/chosen"] > last["rewards/rejected"] + 0.5 and last["loss"] < 0.8 * first["loss"]
    assert last["rewards/margins"] == pytest.approx(last["rewards/chosen"] - last["rewards/rejected"])
    assert last["rewards/accuracies"] > 0.8


def test_held_out_feedback_has_the_loss_that_plain_transformers_give(trained, feedback):
    """By the paper's equations from the log-probs of both models, with nothing of the cache or the trainer."""
    rows = pl.read_parquet(feedback / "pairs/feedback.parquet").filter(split="test")
    ids = {row["response_key"]: row for row in read_responses(feedback / "pairs").to_dicts()}
    assert 5 < len(rows) <= SETTINGS["micro_batch_size"]  # one micro-batch, hence one baseline

    def ratio(key: bytes) -> float:
        sides = [
            sum(plain_logps(model, ids[key]["prompt_ids"], ids[key]["response_ids"]))
            for model in (trained.out / "policy", feedback / "model")
        ]
        return sides[0] - sides[1]

    baseline = max(0.0, float(np.mean([ratio(key) for key in rows["mismatched_key"]])))
    losses, right = [], []
    for key, desirable in rows.select("response_key", "desirable").iter_rows():
        gain = BETA * (ratio(key) - baseline)
        losses.append(WEIGHTS[desirable] * (1 - 1 / (1 + np.exp(-(gain if desirable else -gain)))))
        right.append((gain > 0) == desirable)
    [measured] = trained.evaluations
    assert measured["loss"] == pytest.approx(np.mean(losses), abs=1e-5)
    assert measured["kl"] == pytest.approx(baseline, abs=1e-4)
    assert measured["rewards/accuracies"] == pytest.approx(np.mean(right))


def test_the_memory_plan_reads_feedback(feedback):
    params = TrainParams.model_validate(TRAIN | SETTINGS)
    plan = plan_memory(feedback / "model", feedback / "pairs", params, "all", objective=params.variant("kto"))
    assert plan.micro_batch_tokens > SETTINGS["micro_batch_size"]


def test_pairs_alone_are_no_feedback(phase_one, tmp_path, monkeypatch):
    monkeypatch.setenv("REFCACHE_HOME", str(tmp_path / "work"))
    params = TrainParams.model_validate(TRAIN | SETTINGS)
    with pytest.raises(RequestError, match=r"holds no feedback.*prepare\.feedback: true"):
        train_policy(
            variant="kto", seed=0, params=params, trainable="all", **inputs(phase_one), **outputs(tmp_path / "out")
        )
