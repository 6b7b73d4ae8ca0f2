"""Which parameters train. The same choice drives training and the gradient sketches."""

import math

from torch import nn

from pipeline.errors import RequestError
from pipeline.params import LastFraction, Lora, Trainable


def select_trainable(model: nn.Module, trainable: Trainable) -> nn.Module:
    """Freeze everything but the chosen part; returns the model, wrapped by peft for LoRA.

    model: a transformers causal LM. Raises RequestError where the model has no such part.
    """
    if isinstance(trainable, Lora):
        return _with_lora(model, trainable)
    if trainable == "all":
        return model.requires_grad_(True)
    model.requires_grad_(False)
    if trainable == "head":
        model.get_output_embeddings().requires_grad_(True)
        return model
    blocks = transformer_blocks(model)
    count = math.ceil(trainable.last_fraction * len(blocks)) if isinstance(trainable, LastFraction) else 1
    for block in blocks[len(blocks) - count :]:
        block.requires_grad_(True)
    return model


def transformer_blocks(model: nn.Module) -> nn.ModuleList:
    """The model's list of blocks, whatever its architecture calls it."""
    expected = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == expected:
            return module
    raise RequestError(
        f"{type(model).__name__} has no list of {expected} transformer blocks, so `trainable` can't name its last. "
        "Set trainable: all, head, or lora with blocks: all."
    )


def _with_lora(model: nn.Module, trainable: Lora) -> nn.Module:
    import torch
    from peft import LoraConfig, get_peft_model

    shape = trainable.lora
    config = LoraConfig(
        r=shape.r,
        lora_alpha=shape.alpha,
        target_modules=shape.targets,
        layers_to_transform=[len(transformer_blocks(model)) - 1] if shape.blocks == "last" else None,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(shape.seed)  # the random A belongs to the identity of gradients taken later
        try:
            return get_peft_model(model, config)
        except ValueError as error:
            raise RequestError(f"trainable.lora.targets {shape.targets}: {error}") from None
