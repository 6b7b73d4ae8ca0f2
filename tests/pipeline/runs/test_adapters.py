"""model.adapter: the written reference is the adapter's model to rounding, by peft's own forward, or there is none."""

import copy
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pipeline.errors import RequestError
from pipeline.model.tokenizer import load_tokenizer
from pipeline.params import ModelParams
from tests.pipeline.runs.test_sft import run
from tests.tiny import VOCABULARY, write_model, write_tokenizer

IDS = torch.randint(3, VOCABULARY, (2, 17), generator=torch.Generator().manual_seed(3))
LORA = {"r": 3, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def logps(model) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(IDS).logits.log_softmax(-1)


def opened(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def trained(base, config, folder: Path) -> torch.Tensor:
    """Save an adapter whose trained numbers are random; returns what its model answers."""
    model = base if isinstance(base, torch.nn.Module) else opened(base)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        adapted = get_peft_model(model, copy.deepcopy(config))  # peft writes into it
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn_like(parameter))
    adapted.save_pretrained(folder)
    return logps(adapted)


def edit(folder: Path, change) -> None:
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def refusal(tmp_path: Path) -> str:
    with pytest.raises(RequestError) as error:
        run(tmp_path, {"name": str(tmp_path / "base"), "adapter": str(tmp_path / "adapter")})
    assert not (tmp_path / "reference").exists()
    return str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(**LORA),
        LoraConfig(**LORA, use_rslora=True),
        LoraConfig(**LORA, use_dora=True),
        LoraConfig(**LORA, bias="lora_only"),
        LoraConfig(**LORA, modules_to_save=["lm_head"]),
        LoraConfig(**LORA, trainable_token_indices=[5, 9]),
        LoraConfig(**LORA, init_lora_weights="pissa"),
        LoraConfig(**LORA, init_lora_weights="olora"),
        LoraConfig(**LORA | {"target_modules": ["q_proj", "lm_head"]}),
        LoraConfig(**LORA | {"target_modules": ["q_proj", "lm_head"]}, ensure_weight_tying=True),
        LoraConfig(**LORA | {"target_modules": ["q_proj", "embed_tokens"]}),
        IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ],
    ids=lambda c: " ".join(str(v) for v in (c.peft_type.value, *sorted(c.target_modules), c.to_dict().get("bias"))),
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_written_reference_is_the_adapters_model(tmp_path, config, tied):
    base = write_model(tmp_path / "base", tie_word_embeddings=tied)
    expected = trained(base, config, tmp_path / "adapter")
    assert (logps(opened(base)) - expected).abs().max() > 0.1
    run(tmp_path, {"name": str(base), "adapter": str(tmp_path / "adapter")})
    torch.testing.assert_close(logps(opened(tmp_path / "reference")), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("change", "first"),
    [
        (lambda tensors: {f"prefix.{name}": tensor for name, tensor in tensors.items()}, "prefix.base_model"),
        (lambda tensors: {name: t for name, t in tensors.items() if ".layers.0." in name}, ".layers.1."),
        (
            lambda tensors: {name.replace("v_proj", "v_proj.original_module"): t for name, t in tensors.items()},
            "v_proj.original_module",
        ),
    ],
    ids=["another prefix", "half missing", "original_module"],
)
def test_an_adapter_whose_tensors_have_no_place_is_refused_naming_the_first(tmp_path, change, first):
    trained(write_model(tmp_path / "base"), LoraConfig(**LORA), tmp_path / "adapter")
    edit(tmp_path / "adapter", change)
    assert first in refusal(tmp_path)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), "PROMPT_TUNING"),
        (LoraConfig(**LORA, init_lora_weights="pissa_niter_4"), "init_lora_weights: pissa_niter_4"),
    ],
)
def test_what_cannot_be_merged_exactly_is_refused_by_name(tmp_path, config, expected):
    trained(write_model(tmp_path / "base"), config, tmp_path / "adapter")
    assert expected in refusal(tmp_path)


def with_added_tokens(tmp_path: Path) -> tuple[torch.Tensor, object]:
    """An adapter trained, with all embeddings, on the base after two tokens were added to it."""
    tokenizer = load_tokenizer(ModelParams(name=str(write_model(tmp_path / "base"))))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|a|>", "<|b|>"]})
    base = opened(tmp_path / "base")
    with torch.random.fork_rng():
        base.resize_token_embeddings(len(tokenizer))
    config = LoraConfig(**LORA, modules_to_save=["embed_tokens", "lm_head"])
    return trained(base, config, tmp_path / "adapter"), tokenizer


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_added_tokens_come_with_the_adapter_where_its_tokenizer_proves_them(tmp_path):
    expected, tokenizer = with_added_tokens(tmp_path)
    tokenizer.save_pretrained(tmp_path / "adapter")
    run(tmp_path, {"name": str(tmp_path / "base"), "adapter": str(tmp_path / "adapter")})
    torch.testing.assert_close(logps(opened(tmp_path / "reference")), expected, atol=1e-3, rtol=0)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_added_tokens_without_their_tokenizer_are_refused_with_the_remedy(tmp_path):
    with_added_tokens(tmp_path)
    assert f"resize_token_embeddings({VOCABULARY + 2})" in refusal(tmp_path)


def test_the_adapters_own_tokenizer_and_template_win(tmp_path, capsys):
    params = ModelParams(name=str(write_model(tmp_path / "base")), adapter=str(tmp_path / "adapter"))
    trained(tmp_path / "base", LoraConfig(**LORA), tmp_path / "adapter")
    assert load_tokenizer(params).chat_template is None
    own = load_tokenizer(ModelParams(name=params.name))
    own.chat_template = "{{ messages }}"
    own.save_pretrained(tmp_path / "adapter")
    assert load_tokenizer(params).chat_template == "{{ messages }}"
    assert "model.adapter" in capsys.readouterr().err


def test_an_adapter_as_the_model_is_refused_where_a_project_begins(tmp_path):
    trained(write_model(tmp_path / "base"), LoraConfig(**LORA), tmp_path / "adapter")
    write_tokenizer(tmp_path / "adapter")
    for opening in (
        lambda: load_tokenizer(ModelParams(name=str(tmp_path / "adapter"))),
        lambda: run(tmp_path, {"name": str(tmp_path / "adapter")}),
    ):
        with pytest.raises(RequestError, match=r"Set model\.name to .*base\) and model\.adapter to .*adapter"):
            opening()
