"""Build, load and save causal language models as transformers folders."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from pipeline.errors import RequestError
from pipeline.model.generation import make_savable
from pipeline.model.merged_adapter import merge_adapter
from pipeline.model.opening import is_multimodal, open_config, open_model
from pipeline.model.parts import causal_model, saved_config
from pipeline.model.proof import vocabulary_of
from pipeline.model.text_part import open_text_part
from pipeline.params import ModelParams, ScratchModel


def initial_model(params: ModelParams, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The model that sft starts from, float32: a hub or local model, or random weights of the tokenizer's size."""
    if params.scratch is not None:
        return _from_scratch(params.scratch, tokenizer)
    assert params.name is not None  # ModelParams sees to it
    name, revision, code = params.name, params.revision, params.trust_remote_code
    config = open_config(name, revision=revision, trust_remote_code=code)
    if is_multimodal(config):
        model = open_text_part(name, config, revision=revision, trust_remote_code=code)
    else:
        model = open_model(name, dtype=torch.float32, revision=revision, trust_remote_code=code)
    if params.adapter is not None:
        failed = f"model.adapter {params.adapter!r} can't be merged into model.name {params.name!r}"
        model, _ = merge_adapter(model, params.adapter, failed=failed)
    model.requires_grad_(True)  # peft froze what it merged into
    size = vocabulary_of(model)
    if len(tokenizer) > size:
        raise RequestError(
            f"model.name {params.name!r} has {size} embeddings, its tokenizer {len(tokenizer)} tokens. "
            "Some token ids would have no embedding; use a model and tokenizer that belong together."
        )
    return model


def _from_scratch(scratch: ScratchModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
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


def save_model(
    model: nn.Module, state: dict[str, Tensor], tokenizer: Path, out: Path, *, prove: Callable[[Path], None]
) -> None:
    """Write `state` (the model's parameter names) with config and tokenizer to `out`, complete or not at all.

    prove: called with the written folder before it takes its place; raises where it is not what was meant.
    """
    make_savable(causal_model(model))
    building = out.with_name(f".{out.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    with saved_config(model):
        # peft's wrapper has the same method, and writes the adapter alone.
        cast(PreTrainedModel, model).save_pretrained(building, state_dict=state, safe_serialization=True)
    if causal_model(model) is model:
        copy_tokenizer(tokenizer, building)
    prove(building)
    shutil.rmtree(out, ignore_errors=True)
    building.rename(out)


def copy_tokenizer(tokenizer: Path, model: Path) -> None:
    """Put the tokenizer's files beside the weights, so that the folder works on its own.

    tokenizer: a folder with nothing else, or that of another model; a tokenizer of one's own may name files anyhow.
    """
    for file in sorted(tokenizer.iterdir()):
        weights = file.suffix in (".safetensors", ".bin") or file.name.endswith(".index.json")
        if file.is_file() and not weights and not (model / file.name).exists():
            shutil.copyfile(file, model / file.name)
