"""Training mode computes what evaluation mode does, whatever an architecture calls its dropout, or nothing trains."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from pipeline.errors import RequestError
from pipeline.forward.steadiness import require_steady
from pipeline.model.parts import disable_dropout, has_dropout, saved_config
from tests.pipeline.forward.test_logps import TINY

RATES = {
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.1, "layerdrop": 0.3},
    "gpt2": {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1},
    "gpt_neox": {"hidden_dropout": 0.1, "attention_dropout": 0.1},
    "falcon": {"hidden_dropout": 0.1, "attention_dropout": 0.1},
    "llama": {"attention_dropout": 0.2},
    "phi3": {"resid_pdrop": 0.1, "attention_dropout": 0.1},
    "mixtral": {"router_jitter_noise": 0.2},
}
IDS = torch.randint(3, 61, (2, 20), generator=torch.Generator().manual_seed(0))


def model_of(architecture: str) -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **TINY, **RATES[architecture]))


@pytest.mark.parametrize("architecture", RATES)
def test_every_dropout_is_off_and_the_config_is_saved_as_it_was(architecture, tmp_path):
    model = model_of(architecture)
    expected = model.eval()(IDS).logits
    assert any(not torch.equal(model.train()(IDS).logits, expected) for _ in range(9))
    require_steady(disable_dropout(model))
    assert all(torch.equal(model.train()(IDS).logits, expected) for _ in range(3))
    assert not has_dropout(model)
    with saved_config(model):
        model.config.save_pretrained(tmp_path)
    saved = AutoConfig.from_pretrained(tmp_path)
    assert all(getattr(saved, name) == rate for name, rate in RATES[architecture].items())
    assert torch.equal(model.train()(IDS).logits, expected)


class Hidden(nn.Module):
    """Drops by a number that is nobody's attribute."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *arguments, **options):
        return nn.functional.dropout(self.inner(*arguments, **options), 0.3, self.training)


class OwnLlama(LlamaForCausalLM):
    def __init__(self, config) -> None:
        super().__init__(config)
        self.model.layers[-1].mlp = Hidden(self.model.layers[-1].mlp)


def test_dropout_that_cannot_be_switched_off_is_named():
    model = disable_dropout(OwnLlama(AutoConfig.for_model("llama", **TINY)))
    with pytest.raises(RequestError, match=r"output of model\.layers\.1\.mlp \(Hidden\) changes"):
        require_steady(model)
