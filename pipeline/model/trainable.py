"""Which parameters train. The same choice drives training and the gradient sketches."""

import hashlib
import json
import math

from torch import nn

from pipeline.errors import RequestError
from pipeline.model.parts import canonical_name, causal_model, transformer_blocks
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
        causal_model(model).get_output_embeddings().requires_grad_(True)
        return model
    blocks = transformer_blocks(model)
    count = math.ceil(trainable.last_fraction * len(blocks)) if isinstance(trainable, LastFraction) else 1
    for block in blocks[len(blocks) - count :]:
        block.requires_grad_(True)
    return model


def adapter_digest(model: nn.Module) -> str | None:
    """Hex digest over (name, shape, float32 bytes) of the LoRA tensors that train; None without any.

    Gradients of B depend on the random A, so this belongs to what determines a sketch.
    """
    trained = {canonical_name(name): p for name, p in model.named_parameters() if p.requires_grad}
    tensors = {name: p for name, p in trained.items() if ".lora_" in name}
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        digest.update(json.dumps([name, list(tensors[name].shape)]).encode())
        digest.update(tensors[name].detach().float().cpu().numpy().astype("<f4").tobytes())
    return digest.hexdigest() if tensors else None


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
            adapted: nn.Module = get_peft_model(model, config)
            return adapted
        except ValueError as error:
            raise RequestError(f"trainable.lora.targets {shape.targets}: {error}") from None
