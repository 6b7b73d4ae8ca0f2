"""A LoRA policy is loaded as what was trained, also where its layers share weights with others."""

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from pipeline.errors import RequestError, RunFailed
from pipeline.params import Lora, LoraShape
from pipeline.trainable.merging import loadable
from pipeline.trainable.selection import select_trainable
from tests.tiny import VOCABULARY, write_model

IDS = torch.randint(3, VOCABULARY, (2, 17), generator=torch.Generator().manual_seed(3))


def answers(model) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(IDS).logits.log_softmax(-1)


@pytest.fixture
def policy(tmp_path, monkeypatch):
    """A function of LoRA targets: trains, saves and answers."""
    monkeypatch.setenv("REFCACHE_HOME", str(tmp_path / "home"))

    def train(targets, **config):
        start = AutoModelForCausalLM.from_pretrained(write_model(tmp_path / "reference", **config))
        model = select_trainable(start, Lora(lora=LoraShape(targets=targets)))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        model.save_pretrained(tmp_path / "policy")
        return answers(model)

    return train


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "embed_tokens"]])
def test_the_merged_folder_answers_as_the_policy_that_trained(policy, tmp_path, targets, tied):
    expected = policy(targets, tie_word_embeddings=tied)
    with loadable(tmp_path / "policy", tmp_path / "reference") as folder:
        found = answers(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


def test_a_merge_that_is_written_otherwise_than_it_was_is_noticed(policy, tmp_path, monkeypatch):
    policy(["q_proj"])
    save = PreTrainedModel.save_pretrained

    def spoiled(self, folder, **options):
        with torch.no_grad():
            self.get_output_embeddings().weight.mul_(1.01)
        save(self, folder, **options)

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", spoiled)
    with (
        pytest.raises(RunFailed, match="another model than the one meant"),
        loadable(tmp_path / "policy", tmp_path / "reference"),
    ):
        pass


def test_a_policy_of_another_model_is_refused(policy, tmp_path):
    policy(["q_proj"])
    write_model(tmp_path / "other", num_hidden_layers=1)
    with (
        pytest.raises(RequestError, match="tensors of its file without a place"),
        loadable(tmp_path / "policy", tmp_path / "other"),
    ):
        pass
