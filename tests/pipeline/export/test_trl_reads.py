"""The trl export in TRL's own trainers, with and without this project on the machine that trains."""

import math

import pytest

from tests.project import ScoredProject, write_project

pytest.importorskip("trl", reason="TRL is not installed (pip install -e '.[bench]')")
pytestmark = pytest.mark.slow

import torch  # noqa: E402
from datasets import load_dataset  # noqa: E402
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast  # noqa: E402
from trl import DPOConfig, DPOTrainer  # noqa: E402

from refcache.trl import CachedDPOTrainer  # noqa: E402


class ExportedDPOTrainer(DPOTrainer):
    """As docs/export.md has it."""

    def _prepare_dataset(self, dataset, *ignored):
        return dataset

    def _precompute_ref_logps(self, dataset, *ignored):
        return dataset


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    project = ScoredProject(write_project(tmp_path_factory.mktemp("trl")))
    paths = ["--pairs", project.pairs, "--reference", project.out, "--tokenizer", project.model]
    result = project.run("export", "--to", "trl", *paths, "--out", project.root / "exported")
    assert "for 12 of 12 pairs" in result.output
    return project


@pytest.fixture
def data(project, tmp_path):
    return load_dataset(str(project.root / "exported"), split="train", cache_dir=str(tmp_path))


def trainer(project, kind, data, **options):
    settings = {"precompute_ref_log_probs": True, "max_length": None, "max_steps": 6, "learning_rate": 1e-3}
    settings |= {"per_device_train_batch_size": 4, "logging_steps": 1, "save_strategy": "no", "report_to": "none"}
    settings |= {"bf16": False, "use_cpu": True, "gradient_checkpointing": False}
    model = AutoModelForCausalLM.from_pretrained(project.model, dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(project.model)
    args = DPOConfig(output_dir=str(project.root / "out"), **settings)
    return kind(model=model, args=args, train_dataset=data, processing_class=tokenizer, **options)


def test_the_cached_trainer_finds_every_exported_row_from_its_text(project, data, monkeypatch):
    monkeypatch.setenv("REFCACHE_HOME", str(project.home))
    texts = data.select_columns(["prompt", "chosen", "rejected"])
    found = trainer(project, CachedDPOTrainer, texts, reference_cache=project.out).train_dataset
    for name in ("ref_chosen_logps", "ref_rejected_logps"):
        assert found[name][:] == pytest.approx(data[name][:], rel=1e-6)
    for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert found[name][:] == data[name][:]


def test_two_overridden_methods_train_on_the_exported_ids_and_sums(project, data):
    made = trainer(project, ExportedDPOTrainer, data)
    made.train()
    losses = [row["loss"] for row in made.state.log_history if "loss" in row]
    # The policy starts as the reference, so any sum of other tokens would show in the first loss.
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5) and losses[-1] < 0.6
