"""The output head alone gives what the whole model gives, for the ways in which architectures differ."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.forward.saved_head import load_output_head
from tests.tiny import TINY_MODEL, VOCABULARY

ARCHITECTURES = {
    "tied": ("qwen2", {}),
    "untied": ("qwen2", {"tie_word_embeddings": False}),
    "softcap": ("gemma2", {"head_dim": 16, "final_logit_softcapping": 3.0}),
    "scaled": ("cohere", {"logit_scale": 0.25}),
    "with bias": ("phi", {"tie_word_embeddings": False}),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("chunk", [3, 100])
def test_head_of_a_saved_model_equals_its_logits(tmp_path, name, chunk):
    torch.manual_seed(0)
    kind, changes = ARCHITECTURES[name]
    config = AutoConfig.for_model(kind, vocab_size=VOCABULARY, pad_token_id=0, **(TINY_MODEL | changes))
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.get_output_embeddings().parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    ids = torch.randint(0, VOCABULARY, (1, 12))
    with torch.no_grad():
        logps = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        states = model.base_model(ids).last_hidden_state[0, :-1]
        found = load_output_head(tmp_path, chunk)(states, ids[0, 1:])
    torch.testing.assert_close(found, logps, atol=1e-5, rtol=0)


def test_a_head_that_is_not_found_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    config = AutoConfig.for_model("qwen2", vocab_size=VOCABULARY, **TINY_MODEL)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {name: value for name, value in load_file(file).items() if "embed" not in name}
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"embed_tokens.weight.* is in its safetensors"):
        load_output_head(tmp_path, 8)
