"""The longest sequence that a model takes is the engine's: what vLLM accepts at it, and refuses behind it."""

from types import SimpleNamespace

import pytest
from transformers import AutoConfig

from pipeline.model.limits import model_limits

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
LONG = {"short_factor": [1.0] * 16, "long_factor": [2.0] * 16}


def rope(kind: str, **more) -> dict:
    return {"max_position_embeddings": 128, "rope_parameters": {"rope_type": kind, "rope_theta": 1e4} | more}


CASES = {
    "plain": ("llama", {"max_position_embeddings": 128}, 128, ""),
    "linear": ("llama", rope("linear", factor=2.0), 256, ""),
    "dynamic": ("llama", rope("dynamic", factor=4.0), 512, ""),
    "yarn, scaled": ("llama", rope("yarn", factor=4.0, original_max_position_embeddings=32), 128, ""),
    "yarn, unscaled": (
        "llama",
        rope("yarn", factor=4.0, original_max_position_embeddings=128),
        128,
        "Its config allows 512 (128 times 4)",
    ),
    "llama3": (
        "llama",
        rope("llama3", factor=8.0, original_max_position_embeddings=64, low_freq_factor=1.0, high_freq_factor=4.0),
        128,
        "",
    ),
    "longrope": (
        "phi3",
        rope("longrope", **LONG, original_max_position_embeddings=64) | {"original_max_position_embeddings": 64},
        128,
        "would be another model",
    ),
    "learned": ("opt", {"max_position_embeddings": 128, "ffn_dim": 64, "word_embed_proj_dim": 64}, 128, ""),
    "learned, GPT-2": ("gpt2", {"n_positions": 96}, 96, ""),
    "rotary in part": ("gpt_neox", {"max_position_embeddings": 160}, 160, ""),
    "ALiBi with a length": ("falcon", {"alibi": True, "max_position_embeddings": 128}, 128, "ALiBi"),
    "ALiBi": ("bloom", {"n_head": 2}, None, ""),
}


def write(folder, case: str):
    architecture, config, *_ = CASES[case]
    AutoConfig.for_model(architecture, **SHAPE | config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_positions_and_what_would_raise_them(tmp_path, case):
    *_, positions, hint = CASES[case]
    found = model_limits(write(tmp_path, case))
    assert (found.vocabulary, found.positions) == (64, positions)
    assert hint in found.hint and bool(found.hint) == bool(hint)


@pytest.mark.slow
def test_vllm_takes_that_many_and_no_more(tmp_path):
    """By its own functions, without a ModelConfig: that looks at every class in a process, which takes seconds each."""
    from vllm.config.model import _get_and_verify_max_len
    from vllm.transformers_utils.config import get_config
    from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase

    def accepts(folder, length: int) -> bool:
        config = get_config(folder, trust_remote_code=False)
        derived = ModelArchConfigConvertorBase(config, config.get_text_config()).derive_max_model_len_and_key()
        try:
            _get_and_verify_max_len(
                config,
                SimpleNamespace(derived_max_model_len_and_key=derived),
                tokenizer_config=None,
                max_model_len=length,
                disable_sliding_window=False,
                sliding_window=None,
            )
        except ValueError as error:
            assert "max_model_len" in str(error)
            return False
        return True

    for case in CASES:
        folder = write(tmp_path / case, case)
        positions = model_limits(folder).positions
        assert accepts(folder, positions or 100_000), case
        assert positions is None or not accepts(folder, positions + 1), case
