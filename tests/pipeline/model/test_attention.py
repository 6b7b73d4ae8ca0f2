"""A model is opened with attention that computes what its config says, whatever the default kernel leaves out."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.errors import RequestError
from pipeline.model.opening import open_model
from tests.pipeline.forward.test_logps import TINY
from tests.tiny import write_model

IDS = torch.randint(3, 61, (2, 20), generator=torch.Generator().manual_seed(0))


def write_gemma2(folder, **config):
    """With scores around its cap, as trained models have them."""
    torch.manual_seed(0)
    shape = TINY | {"head_dim": 8, "query_pre_attn_scalar": 8, "initializer_range": 0.5}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma2", **shape | config)).save_pretrained(folder)
    return folder


def logps(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits.log_softmax(-1)


def by_transformers(folder, attention: str) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention)
    return logps(model.eval())


def test_a_soft_cap_that_the_default_kernel_leaves_out_is_computed(tmp_path, capsys):
    folder = write_gemma2(tmp_path, attn_logit_softcapping=5.0)
    capped, uncapped = by_transformers(folder, "eager"), by_transformers(folder, "sdpa")
    assert (capped - uncapped).abs().max() > 0.01
    opened = open_model(folder, dtype=torch.float32)
    assert torch.equal(logps(opened), capped)
    assert "Gemma2ForCausalLM: sdpa attention is off by" in capsys.readouterr().err


def test_without_a_cap_the_default_kernel_stays(tmp_path):
    folder = write_gemma2(tmp_path, attn_logit_softcapping=None)
    assert open_model(folder, dtype=torch.float32).config._attn_implementation == "sdpa"


@pytest.mark.parametrize("field", ["attn_logit_softcapping", "logits_scaling", "attention_multiplier"])
def test_a_number_in_the_config_that_nothing_computes_is_refused(tmp_path, field):
    """An engine may know it: then cache and trainer would be two functions."""
    folder = write_model(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {field: 30.0}))
    with pytest.raises(RequestError, match=rf"Qwen2ForCausalLM: its config has {field} 30\.0, which changes nothing"):
        open_model(folder, dtype=torch.float32)
