"""Which parameters train. The same choice drives training and the gradient sketches."""

import hashlib
import json
import math
from typing import Any

from torch import nn

from pipeline.errors import RequestError
from pipeline.model.parts import canonical_name, causal_model, transformer_blocks
from pipeline.params import LastFraction, Lora, Trainable
from pipeline.trainable.targets import count_adapted, lora_modules, require_adapted


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


def count_trained(model: nn.Module) -> dict[str, Any]:
    """parameters and trained_parameters, numbers; for a LoRA adapted: how many layers of which name have its factors.

    parameters: of the model itself, without adapters. Also under ZeRO-3, where each rank holds a part.
    """
    sizes = {name: getattr(p, "ds_numel", p.numel()) for name, p in model.named_parameters()}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    adapted = count_adapted(model)
    own = sum(size for name, size in sizes.items() if not (adapted and name in trained))
    counts = {"parameters": own, "trained_parameters": sum(sizes[name] for name in trained)}
    return counts | ({"adapted": adapted} if adapted else {})


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
    wanted = lora_modules(model, shape)
    config = LoraConfig(
        r=shape.r,
        lora_alpha=shape.alpha,
        target_modules=wanted,  # by full names, since peft's own rules widen some choices (blocks, experts)
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(shape.seed)  # the random A belongs to the identity of gradients taken later
        try:
            adapted: nn.Module = get_peft_model(model, config)
        except ValueError as error:
            raise RequestError(f"trainable.lora.targets {shape.targets}: {error}") from None
    require_adapted(adapted, wanted)
    return adapted
