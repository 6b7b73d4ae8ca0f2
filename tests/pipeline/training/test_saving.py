"""What is written is what was trained, or nothing is published."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from pipeline.errors import RunFailed
from pipeline.model.trainable import select_trainable
from pipeline.params import Lora, LoraShape
from pipeline.training.job import Job
from pipeline.training.saving import save_trained, try_saving
from tests.tiny import write_model, write_tokenizer

LORA = Lora(lora=LoraShape(targets=["q_proj"]))


class OneRank(SimpleNamespace):
    """As much of the training engine as saving uses."""

    rank = 0

    def gathered_state(self, model, *, trained_only):
        return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad or not trained_only}


@pytest.fixture(params=["all", LORA], ids=["whole", "LoRA"])
def run(request, tmp_path):
    """(model, engine, job, work folder)."""
    start = write_model(tmp_path / "start")
    model = select_trainable(AutoModelForCausalLM.from_pretrained(start), request.param)
    paths = {"model": str(start), "tokenizer": str(write_tokenizer(tmp_path / "tokenizer"))}
    job = Job(kind="preferences", title="dpo-0", paths=paths, loop={}, settings={}, seed=0)
    (tmp_path / "work").mkdir()
    return model, OneRank(), job, tmp_path / "work"


def spoil(monkeypatch, change):
    """After each save, the file's tensors are changed."""
    for kind in (PreTrainedModel, __import__("peft").PeftModel):
        original = kind.save_pretrained

        def save(self, folder, *arguments, original=original, **options):
            original(self, folder, *arguments, **options)
            for file in folder.glob("*.safetensors"):
                save_file(change(load_file(file)), file, metadata={"format": "pt"})

        monkeypatch.setattr(kind, "save_pretrained", save)


def test_saving_is_tried_without_a_trace_and_done_with_the_trained_numbers(run):
    model, engine, job, work = run
    try_saving(model, engine, job, work)
    assert not list(work.iterdir())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.25)
    save_trained(model, engine, job, work / "model")
    [file] = (work / "model").glob("*.safetensors")
    for name, tensor in load_file(file).items():
        own = name if name in model.state_dict() else name.replace(".weight", ".default.weight")
        assert torch.equal(tensor, model.state_dict()[own])


@pytest.mark.parametrize("step", [try_saving, lambda m, e, j, w: save_trained(m, e, j, w / "model")])
def test_another_number_in_the_file_is_noticed(run, monkeypatch, step):
    spoil(monkeypatch, lambda tensors: {name: tensor + 1e-3 for name, tensor in tensors.items()})
    with pytest.raises(RunFailed, match=r"holds other numbers than the model in memory; tensors that differ"):
        step(*run)
    assert not (run[-1] / "model").exists()
