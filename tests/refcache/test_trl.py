"""TRL's own trainers on a reference cache, against TRL with a reference model of its own."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cache import CacheIncomplete, logps_table, prompt_key, publish_reference, response_key
from pipeline.reference.identity import reference_identity
from tests import ROOT
from tests.tiny import EOS, draw_sequence, plain_logps, write_model

pytest.importorskip("trl", reason="TRL is not installed (pip install -e '.[bench]')")
pytestmark = pytest.mark.slow

import numpy as np  # noqa: E402
from datasets import Dataset  # noqa: E402
from peft import LoraConfig  # noqa: E402
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast  # noqa: E402
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer  # noqa: E402

from refcache.trl import CachedDPOTrainer, CachedKTOTrainer, CachedReference  # noqa: E402

STEPS = 20
Sequences = list[tuple[list[int], list[int]]]


def words(ids):
    return " ".join("</s>" if i == EOS else f"w{i}" for i in ids)


def draw_preferences(rows, seed):
    draw = np.random.default_rng(seed)
    return [
        (draw_sequence(draw, 2, 9), [*draw_sequence(draw, 2, 15), EOS], [*draw_sequence(draw, 2, 15), EOS])
        for _ in range(rows)
    ]


def publish(out: Path, model: Path, sequences: Sequences) -> Path:
    rows = {response_key(*row): row for row in sequences}
    prompts, responses = zip(*rows.values(), strict=True)
    table = logps_table(
        response_keys=list(rows),
        prompt_keys=[prompt_key(prompt) for prompt in prompts],
        n_prompt_tokens=[len(prompt) for prompt in prompts],
        token_ids=list(responses),
        token_logps=[plain_logps(model, *row) for row in rows.values()],
    )
    publish_reference(out, table, reference_identity(model, dtype="float32", quantization=None))
    return out


class Place:
    """A model, preferences to train and evaluate on, and the reference cache of all of them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.model = folder, write_model(folder / "model")
        train, test = draw_preferences(24, 0), draw_preferences(6, 1)
        self.pairs, self.test = self.dataset(train), self.dataset(test)
        self.rows = [(p, r) for p, *responses in train + test for r in responses]
        self.cache = publish(folder / "logps", self.model, self.rows)

    @staticmethod
    def dataset(preferences) -> Dataset:
        texts = [(words(p), " " + words(c), " " + words(r)) for p, c, r in preferences]
        return Dataset.from_list([dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in texts])

    def feedback(self) -> Dataset:
        rows = [
            {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
            for row in self.pairs
            for side in ("chosen", "rejected")
        ]
        return Dataset.from_list(rows).shuffle(seed=5)

    def trainer(self, kind, *, config=DPOConfig, settings=(), train_dataset=None, **options):
        args = config(
            **{
                "output_dir": str(self.folder / "out"),
                "per_device_train_batch_size": 4,
                "per_device_eval_batch_size": 4,
                "max_steps": STEPS,
                "learning_rate": 1e-3,
                "lr_scheduler_type": "constant",
                "logging_steps": 1,
                "save_strategy": "no",
                "report_to": "none",
                "bf16": False,
                "use_cpu": True,
                "gradient_checkpointing": False,
                "seed": 3,
                **dict(settings),
            }
        )
        model = AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(self.model)
        data = train_dataset or self.pairs
        torch.manual_seed(0)
        return kind(model=model, args=args, train_dataset=data, processing_class=tokenizer, **options)

    def losses(self, kind, *, peer=False, **options):
        """Of every step, and at the end of the evaluation set where there is one. peer: with a reference of its own."""
        if not peer:
            options["reference_cache"] = self.cache
        trainer = self.trainer(kind, **options)
        trainer.train()
        found = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        assert len(found) == STEPS
        return found + ([trainer.evaluate()["eval_loss"]] if "eval_dataset" in options else [])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REFCACHE_HOME", str(home))
        yield Place(tmp_path_factory.mktemp("trl"))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"settings": {"max_length": 12}},
        {"settings": {"ld_alpha": 0.5, "max_length": 16}},
        {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights="gaussian")},
    ],
    ids=["plain", "truncated", "ld_alpha", "lora"],
)
def test_dpo_has_the_losses_of_trls_own_reference(place, options):
    options["eval_dataset"] = place.test
    losses = place.losses(CachedDPOTrainer, **options)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses == pytest.approx(place.losses(DPOTrainer, peer=True, **options), abs=2e-5)
    assert min(losses[:-1]) < 0.6  # else equal losses say little


def test_a_stand_in_for_the_reference_model_serves_trls_own_trainer(place):
    with_cache = place.trainer(DPOTrainer, ref_model=CachedReference(place.cache), settings={"max_length": 12})
    with_model = place.trainer(DPOTrainer, settings={"max_length": 12})
    found = []
    for trainer in (with_cache, with_model):
        trainer.train()
        found.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert found[0] == pytest.approx(found[1], abs=2e-5)


def mismatched(dataset: Dataset, batch_size: int) -> Sequences:
    """Each prompt with the completion before its own in its batch, as the paper's code pairs them."""
    ids = [[[EOS if w == "</s>" else int(w[1:]) for w in row[part].split()] for row in dataset] for part in COMPLETIONS]
    rows = []
    for start in range(0, len(dataset), batch_size):
        prompts, completions = (part[start : start + batch_size] for part in ids)
        rows += zip(prompts, completions[-1:] + completions[:-1], strict=True)
    return rows


COMPLETIONS = ("prompt", "completion")


@pytest.mark.parametrize("stand_in", [False, True])
def test_kto_has_the_losses_of_trls_own_reference(place, tmp_path, stand_in):
    data = place.feedback()
    cache = publish(tmp_path / "logps", place.model, place.rows + mismatched(data, 4))
    options = {"config": KTOConfig, "train_dataset": data}
    ours = {"ref_model": CachedReference(cache)} if stand_in else {"reference_cache": cache}
    found = []
    for kind, more in ((KTOTrainer if stand_in else CachedKTOTrainer, ours), (KTOTrainer, {})):
        trainer = place.trainer(kind, **options, **more)
        trainer.train()
        found.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert found[0] == pytest.approx(found[1], abs=2e-5)
    assert len(set(found[0])) > STEPS / 2


def test_a_missing_mismatched_completion_is_named_as_one(place):
    with pytest.raises(CacheIncomplete, match="Row 0 of the train set, its mismatched completion"):
        place.trainer(CachedKTOTrainer, config=KTOConfig, train_dataset=place.feedback(), reference_cache=place.cache)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            {"prompt": "w9 w9 w9 w9"},
            "Row 5 of the train set, its chosen response: .* nor any other response",
        ),
        (
            {"rejected": " w9 w9 w9 </s>"},
            "Row 5 of the train set, its rejected response: .* the closest",
        ),
    ],
)
def test_a_missing_row_is_named_before_the_first_step(place, change, reason):
    rows = list(place.pairs)
    rows[5] = rows[5] | change
    with pytest.raises(CacheIncomplete, match=reason):
        place.trainer(CachedDPOTrainer, train_dataset=Dataset.from_list(rows), reference_cache=place.cache)


def test_what_a_template_writes_after_the_end_is_told_as_the_reason(place):
    rows = list(place.pairs)
    rows[2]["chosen"] += " w7 </s>"
    with pytest.raises(CacheIncomplete, match=r"it has the first .* of them, without 'w7 </s>' at the end"):
        place.trainer(CachedDPOTrainer, train_dataset=Dataset.from_list(rows), reference_cache=place.cache)


def test_a_prompt_that_lost_its_beginning_is_another_prompt(place):
    settings = {"max_length": 12, "truncation_mode": "keep_end"}
    with pytest.raises(CacheIncomplete, match="a prompt that lost its beginning"):
        place.trainer(CachedDPOTrainer, settings=settings, reference_cache=place.cache)


def test_a_new_set_is_evaluated_after_the_first_step(place):
    trainer = place.trainer(CachedDPOTrainer, reference_cache=place.cache)
    trainer.train()
    peer = place.trainer(DPOTrainer)
    peer.train()
    assert trainer.evaluate(place.test)["eval_loss"] == pytest.approx(peer.evaluate(place.test)["eval_loss"], abs=2e-5)


def test_a_reference_of_ones_own_beside_a_cache_is_refused(place):
    own = AutoModelForCausalLM.from_pretrained(place.model)
    with pytest.raises(ValueError, match="one or the other"):
        place.trainer(CachedDPOTrainer, reference_cache=place.cache, ref_model=own)


def test_two_processes_have_the_losses_of_one_with_twice_the_batch(place):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    command += ["-m", "tests.refcache.test_trl", str(place.folder), str(place.cache)]
    search = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": search}, check=True, capture_output=True)
    losses = json.loads((place.folder / "losses.json").read_text())
    peer = place.losses(DPOTrainer, peer=True, settings={"per_device_train_batch_size": 8})
    assert losses == pytest.approx(peer, abs=2e-5)


if __name__ == "__main__":  # one of two processes
    one = Place.__new__(Place)
    one.folder, one.cache = map(Path, sys.argv[1:])
    one.model, one.pairs = one.folder / "model", Place.dataset(draw_preferences(24, 0))
    trainer = one.trainer(CachedDPOTrainer, settings={"ddp_backend": "gloo"}, reference_cache=one.cache)
    trainer.train()
    if trainer.accelerator.is_main_process:
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        (one.folder / "losses.json").write_text(json.dumps(losses))
