"""What is written is what was trained, or nothing is published."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from pipeline.errors import RunFailed
from pipeline.params import Lora, LoraShape
from pipeline.trainable.saving import Trained, save_trained, try_saving
from pipeline.trainable.selection import select_trainable
from tests.tiny import write_model, write_tokenizer

LORA = Lora(lora=LoraShape(targets=["q_proj"]))


@pytest.fixture(params=["all", LORA], ids=["whole", "LoRA"])
def trained(request, tmp_path):
    start = write_model(tmp_path / "start")
    model = select_trainable(AutoModelForCausalLM.from_pretrained(start), request.param)
    state = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return Trained(model, state, write_tokenizer(tmp_path / "tokenizer"), start, trust_remote_code=False)


def spoil(monkeypatch, change):
    """After each save, the file's tensors are changed."""
    for kind in (PreTrainedModel, __import__("peft").PeftModel):
        original = kind.save_pretrained

        def save(self, folder, *arguments, original=original, **options):
            original(self, folder, *arguments, **options)
            for file in folder.glob("*.safetensors"):
                save_file(change(load_file(file)), file, metadata={"format": "pt"})

        monkeypatch.setattr(kind, "save_pretrained", save)


def test_saving_is_tried_without_a_trace_and_done_with_the_trained_numbers(trained, tmp_path):
    try_saving(trained, tmp_path / "work/untrained")
    assert not list((tmp_path / "work").iterdir())
    model = trained.model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.25)
    save_trained(trained, tmp_path / "work/model")
    [file] = (tmp_path / "work/model").glob("*.safetensors")
    for name, tensor in load_file(file).items():
        own = name if name in model.state_dict() else name.replace(".weight", ".default.weight")
        assert torch.equal(tensor, model.state_dict()[own])


@pytest.mark.parametrize("save", [try_saving, save_trained])
def test_another_number_in_the_file_is_noticed(trained, monkeypatch, tmp_path, save):
    spoil(monkeypatch, lambda tensors: {name: tensor + 1e-3 for name, tensor in tensors.items()})
    with pytest.raises(RunFailed, match=r"holds other numbers than the model in memory; tensors that differ"):
        save(trained, tmp_path / "work/model")
    assert not (tmp_path / "work/model").exists()
