"""The model that supervised fine-tuning starts from: a hub or local one with its adapter merged, or random weights."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from pipeline.errors import RequestError
from pipeline.model.opening import is_multimodal, open_config, open_model
from pipeline.model.proof import vocabulary_of
from pipeline.model.text_part import open_text_part
from pipeline.params import ModelParams, ScratchModel
from pipeline.trainable.merging import merge_adapter


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
