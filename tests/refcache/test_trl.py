"""TRL's own trainers on a reference cache, against TRL with a reference model of its own."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="TRL is not installed (pip install -e '.[bench]')")
pytestmark = pytest.mark.slow

import numpy as np  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402
from trl import DPOTrainer, KTOConfig, KTOTrainer  # noqa: E402

from cache import CacheIncomplete  # noqa: E402
from refcache.trl import CachedDPOTrainer, CachedKTOTrainer, CachedReference, DPOFromCache  # noqa: E402
from tests import ROOT, stand_in  # noqa: E402
from tests.project import PARAMS, Project  # noqa: E402
from tests.refcache.preferences import Place, draw_preferences, losses_of  # noqa: E402

BETA = 0.1  # TRL's default
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights="gaussian")


def tolerance(ours, theirs, columns=("ref_chosen_logps", "ref_rejected_logps")):
    """Of losses. d: the largest difference of a sequence's reference log-prob, nats. A first loss is off by at most
    beta times that of two sequences; a loss moves weights and so its successors, which gets ten times as much."""
    d = max(np.abs(np.subtract(ours.train_dataset[c], theirs.train_dataset[c])).max() for c in columns)
    assert d < 1e-4  # float noise, and no other values
    return 10 * 2 * BETA * max(d, 1e-6)


def test_fifty_steps_have_the_losses_of_trls_own_precompute(place):
    options = {"settings": {"max_steps": 50}, "eval_dataset": {"held_out": place.test, "again": place.pairs}}
    ours = place.trainer(CachedDPOTrainer, reference_cache=place.cache, **options)
    options["settings"] = {"max_steps": 50, "precompute_ref_log_probs": True}
    peer = place.trainer(DPOTrainer, **options)
    within = tolerance(ours, peer)
    losses = losses_of(ours)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses == pytest.approx(losses_of(peer), abs=within)
    assert len(losses) == 50 and min(losses) < 0.3  # else equal losses say little
    found, expected = ours.evaluate(), peer.evaluate()
    for name in ("eval_held_out_loss", "eval_again_loss"):
        assert found[name] == pytest.approx(expected[name], abs=within)


@pytest.mark.parametrize(
    "options",
    [
        {"settings": {"max_length": 12, "loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [1, 0.5, 0.1]}},
        {"settings": {"ld_alpha": 0.5, "max_length": 16}},
        {"peft_config": LORA},
    ],
    ids=["truncated-and-three-losses", "ld_alpha", "lora"],
)
def test_dpo_has_the_losses_of_trls_own_reference(place, options):
    ours, peer = (
        place.trainer(CachedDPOTrainer, reference_cache=place.cache, **options),
        place.trainer(DPOTrainer, **options),
    )
    losses = losses_of(ours)
    assert losses == pytest.approx(losses_of(peer), abs=2e-5)
    assert len(set(losses)) > 5


def test_an_adapter_that_trains_on_has_the_cached_reference_and_not_its_own_start(place):
    """TRL takes a copy of it for the reference; the cache's is the model that was scored, here the one without."""
    base = AutoModelForCausalLM.from_pretrained(place.model)
    trainer = place.trainer(CachedDPOTrainer, model=get_peft_model(base, LORA), reference_cache=place.cache)
    assert losses_of(trainer)[0] == pytest.approx(losses_of(place.trainer(DPOTrainer, peft_config=LORA))[0], abs=2e-5)


@pytest.mark.parametrize("precompute", [False, True])
def test_a_stand_in_for_the_reference_model_serves_trls_own_trainer(place, precompute):
    settings = {"max_length": 12, "precompute_ref_log_probs": precompute}
    with_cache = place.trainer(DPOTrainer, ref_model=CachedReference(place.cache), settings=settings)
    assert losses_of(with_cache) == pytest.approx(
        losses_of(place.trainer(DPOTrainer, settings={"max_length": 12})), abs=2e-5
    )


class TakesAnything(DPOTrainer):
    """As trainers built on TRL's do."""

    def __init__(self, *args, dataset_tags=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.dataset_tags = dataset_tags


class TakesAnythingFromCache(DPOFromCache, TakesAnything):
    pass


def test_trainers_built_on_trls_take_the_cache_too(place):
    def kind(model, **options):
        return TakesAnythingFromCache(model, None, dataset_tags=["own"], reference_cache=place.cache, **options)

    trainer = place.trainer(kind)
    assert trainer.dataset_tags == ["own"]
    assert losses_of(trainer)[0] == pytest.approx(math.log(2), abs=1e-6)


def test_a_resumed_training_goes_on_as_it_would_have(place, tmp_path):
    def trainer(**more):
        settings = {"output_dir": str(tmp_path), "max_steps": 6, "save_strategy": "steps", "save_steps": 3} | more
        return place.trainer(CachedDPOTrainer, reference_cache=place.cache, settings=settings)

    whole = losses_of(trainer())
    assert losses_of(trainer(), resume_from_checkpoint=str(tmp_path / "checkpoint-3")) == pytest.approx(whole)


def test_a_new_set_is_evaluated_after_the_first_step(place):
    trainer, peer = place.trainer(CachedDPOTrainer, reference_cache=place.cache), place.trainer(DPOTrainer)
    losses_of(trainer), losses_of(peer)
    assert trainer.evaluate(place.test)["eval_loss"] == pytest.approx(peer.evaluate(place.test)["eval_loss"], abs=2e-5)


def test_kto_is_told_what_scores_its_mismatched_completions_and_then_has_trls_losses(place, tmp_path, monkeypatch):
    options = {"config": KTOConfig, "train_dataset": place.feedback(), "settings": {"output_dir": str(tmp_path)}}
    with pytest.raises(CacheIncomplete, match="45 as mismatched completion of KTO's baseline in the train set") as told:
        place.trainer(CachedKTOTrainer, reference_cache=place.cache, **options)
    command, caches = (line.split() for line in str(told.value).splitlines()[-2:])
    assert command[:2] == ["refcache", "score"]
    for name, value in stand_in.environment({}).items():
        monkeypatch.setenv(name, value)
    words = [str(place.model) if word == "REFERENCE" else word for word in command[1:]]
    scored = Project(tmp_path).run(*words, "--params", PARAMS)
    assert scored.exit_code == 0 and "45 rows scored" in scored.output, scored.output
    both = [place.cache, Path(caches[-1].removesuffix("]").strip("'"))]
    peer = losses_of(place.trainer(KTOTrainer, **options))
    assert len(set(peer)) > 5
    for kind, ours in (
        (CachedKTOTrainer, {"reference_cache": both}),
        (KTOTrainer, {"ref_model": CachedReference(both)}),
    ):
        assert losses_of(place.trainer(kind, **options, **ours)) == pytest.approx(peer, abs=2e-5)


def train_in_processes(place, number, settings, environment=()) -> dict:
    """What the end of this file writes: losses, what a changed row says, and the class that trains."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={number}", "--standalone"]
    command += ["-m", "tests.refcache.test_trl", str(place.folder), str(place.cache), json.dumps(settings)]
    search = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    env = os.environ | {"PYTHONPATH": search} | dict(environment)
    (place.folder / "found.json").unlink(missing_ok=True)
    subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True)
    return json.loads((place.folder / "found.json").read_text())


def test_two_processes_have_the_losses_of_one_with_twice_the_batch(place):
    found = train_in_processes(place, 2, {"ddp_backend": "gloo"})
    peer = place.trainer(DPOTrainer, settings={"per_device_train_batch_size": 8})
    assert found["trains"] == "DistributedDataParallel"
    assert found["losses"] == pytest.approx(losses_of(peer), abs=2e-5)
    assert "2 of 48 responses are missing" in found["missing"]


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_has_the_losses_of_trls_own_precompute(place, stage):
    batch = {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 1}
    config = {**batch, "zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True}
    no_gpu = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    found = train_in_processes(place, 2, {"deepspeed": config}, no_gpu)
    peer = place.trainer(DPOTrainer, settings={"per_device_train_batch_size": 8, "precompute_ref_log_probs": True})
    assert found["trains"] == "DeepSpeedEngine"
    assert found["losses"] == pytest.approx(losses_of(peer), abs=2e-5)
    assert "2 of 48 responses are missing" in found["missing"]


if __name__ == "__main__":  # one of the processes
    one = Place.__new__(Place)
    one.folder, one.cache = map(Path, sys.argv[1:3])
    one.model, one.pairs = one.folder / "model", Place.dataset(draw_preferences(24, 0))
    settings = {"output_dir": str(one.folder / "processes"), **json.loads(sys.argv[3])}
    trainer = one.trainer(CachedDPOTrainer, settings=settings, reference_cache=one.cache)
    found = {"losses": losses_of(trainer), "trains": type(trainer.model_wrapped).__name__}
    other = one.pairs.to_list()
    other[0]["prompt"] = "w9 w9 w9"
    try:
        changed = one.pairs.from_list(other)
        one.trainer(CachedDPOTrainer, settings=settings, reference_cache=one.cache, train_dataset=changed)
    except CacheIncomplete as error:
        if trainer.accelerator.is_main_process:
            (one.folder / "found.json").write_text(json.dumps({**found, "missing": str(error)}))
