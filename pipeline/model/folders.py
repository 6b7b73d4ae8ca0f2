"""Build, load and save causal language models as transformers folders."""

import shutil
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

from pipeline.errors import RequestError
from pipeline.forward.head import causal_model
from pipeline.model.tokenizer import open_tokenizer
from pipeline.params import ModelParams, ScratchModel


def initial_model(params: ModelParams, tokenizer: PreTrainedTokenizerBase) -> nn.Module:
    """The model that sft starts from, float32: a hub or local model, or random weights of the tokenizer's size."""
    if params.scratch is not None:
        return _from_scratch(params.scratch, tokenizer)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            params.name, revision=params.revision, trust_remote_code=params.trust_remote_code, dtype=torch.float32
        )
    except (OSError, ValueError) as error:
        raise RequestError(f"model.name {params.name!r} can't be loaded: {error}") from None
    if params.adapter is not None:
        model = _merge_adapter(model, params)
    size = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > size:
        raise RequestError(
            f"model.name {params.name!r} has {size} embeddings, its tokenizer {len(tokenizer)} tokens. "
            "Some token ids would have no embedding; use a model and tokenizer that belong together."
        )
    return model


def _merge_adapter(model: nn.Module, params: ModelParams) -> nn.Module:
    """Plain weights with the adapter added: what is scored, trained from and digested is then one and the same."""
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, params.adapter).merge_and_unload(safe_merge=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:  # absent, malformed, of other shapes, not finite
        raise RequestError(
            f"model.adapter {params.adapter!r} can't be merged into model.name {params.name!r}: {error}"
        ) from None


def disable_dropout(model: nn.Module) -> nn.Module:
    """No dropout, also in training mode (which activation checkpointing needs): the reference was scored without."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
    return model


def has_dropout(model: nn.Module) -> bool:
    """Of whatever kind, in training mode."""
    rates = [m.p if isinstance(m, nn.Dropout) else getattr(m, "attention_dropout", 0.0) for m in model.modules()]
    return any(isinstance(rate, int | float) and rate > 0 for rate in rates)


def load_policy_start(folder: Path) -> nn.Module:
    """The reference's weights, float32 masters, to train a policy from."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    if not folder.is_dir():
        raise RequestError(f"{folder} does not exist; it is written by `refcache prepare` (run `dvc repro prepare`).")
    return open_tokenizer(folder)


def _from_scratch(scratch: ScratchModel, tokenizer: PreTrainedTokenizerBase) -> nn.Module:
    try:
        known = AutoConfig.for_model(scratch.architecture)
    except ValueError:
        raise RequestError(f"model.scratch.architecture {scratch.architecture!r} is unknown to transformers") from None
    unknown = sorted(key for key in scratch.config if not hasattr(known, key))
    if unknown:
        raise RequestError(f"model.scratch.config: {type(known).__name__} has no {unknown}; misspelt?")
    config = AutoConfig.for_model(
        scratch.architecture,
        **{
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        | scratch.config,
    )
    with torch.random.fork_rng():
        torch.manual_seed(scratch.seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def save_model(model: nn.Module, state: dict[str, Tensor], tokenizer: Path, out: Path) -> None:
    """Write `state` (the model's parameter names) with config and tokenizer to `out`, complete or not at all."""
    building = out.with_name(f".{out.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    model.save_pretrained(building, state_dict=state, safe_serialization=True)
    if causal_model(model) is model:
        copy_tokenizer(tokenizer, building)
    shutil.rmtree(out, ignore_errors=True)
    building.rename(out)


def copy_tokenizer(tokenizer: Path, model: Path) -> None:
    """Put the tokenizer's files beside the weights, so that the folder works on its own."""
    names = ("token", "vocab", "merges", "special", "added", "chat_template", "spiece")
    for file in sorted(tokenizer.iterdir()):
        if file.name.startswith(names):
            shutil.copyfile(file, model / file.name)
