"""Of a multimodal model the text part is taken where it computes the same, and nothing else is scored as if it did."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from pipeline.errors import RequestError
from pipeline.model.opening import open_model
from tests.pipeline.runs.test_sft import run
from tests.tiny import VOCABULARY, write_tokenizer

TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
VISION |= {"image_size": 28, "patch_size": 14}
IDS = torch.randint(4, VOCABULARY, (2, 15), generator=torch.Generator().manual_seed(0))


def write_multimodal(folder, kind: str, text: dict, vision: dict) -> torch.Tensor:
    """A random one; returns its log-probs of IDS."""
    torch.manual_seed(0)
    tokens = {"image_token_index": 3, "image_token_id": 3}
    config = AutoConfig.for_model(kind, text_config=TEXT | text, vision_config=vision, **tokens)
    model = AutoModelForImageTextToText.from_config(config).eval()
    model.save_pretrained(folder)
    write_tokenizer(folder)
    with torch.inference_mode():
        return model(IDS).logits.log_softmax(-1)


@pytest.mark.parametrize(
    ("kind", "text"), [("gemma3", {}), ("mistral3", {"model_type": "mistral"}), ("llava", {"model_type": "llama"})]
)
def test_sft_writes_the_text_part_with_the_wholes_answers(tmp_path, kind, text):
    expected = write_multimodal(tmp_path / "whole", kind, text, VISION)
    run(tmp_path, {"name": str(tmp_path / "whole")})
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "reference", dtype=torch.float32).eval()
    assert written.config.get_text_config() is written.config
    with torch.inference_mode():
        torch.testing.assert_close(written(IDS).logits.log_softmax(-1), expected, atol=1e-5, rtol=0)
    with pytest.raises(RequestError, match=rf"multimodal model \({kind}\).*refcache sft"):
        open_model(tmp_path / "whole", dtype=torch.float32)


@pytest.mark.slow
def test_a_model_without_a_text_part_of_its_own_is_refused_by_name(tmp_path):
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 1, "mlp_ratio": 1}
    write_multimodal(tmp_path / "whole", "qwen2_vl", {"rope_parameters": rope}, vision)
    with pytest.raises(RequestError, match=r"text part of Qwen2VLForConditionalGeneration can't be taken"):
        run(tmp_path, {"name": str(tmp_path / "whole")})
