"""Where the parts of a transformers causal language model are, whatever its architecture and wrapping call them."""

from torch import nn

from pipeline.errors import RequestError


def causal_model(model: nn.Module) -> nn.Module:
    """The transformers model itself, out of its peft wrapper if it has one (peft injects its layers in place)."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


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


def canonical_name(name: str) -> str:
    """A parameter's name without what wraps the model: peft's prefix, and the name of its one adapter."""
    return name.removeprefix("base_model.model.").replace(".default.", ".").replace(".base_layer.", ".")


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
