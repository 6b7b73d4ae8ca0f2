"""Where the parts of a transformers causal language model are, whatever its architecture and wrapping call them."""

from typing import TYPE_CHECKING, cast

from torch import nn

from pipeline.errors import RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def causal_model(model: nn.Module) -> "PreTrainedModel":
    """The transformers model itself, out of its peft wrapper if it has one (peft injects its layers in place)."""
    unwrap = getattr(model, "get_base_model", None)
    return cast("PreTrainedModel", model if unwrap is None else unwrap())


def text_config(model: nn.Module) -> "PreTrainedConfig":
    """The language model's own config, which multimodal architectures keep inside theirs."""
    return causal_model(model).config.get_text_config()


def transformer_blocks(model: nn.Module) -> nn.ModuleList:
    """The model's list of blocks, whatever its architecture calls it."""
    expected = text_config(model).num_hidden_layers
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
            module.attention_dropout = 0.0  # type: ignore[assignment]  # stubs: modules hold tensors and modules
    return model


def has_dropout(model: nn.Module) -> bool:
    """Whether a forward in training mode would drop anything, by whatever kind of layer."""
    rates = [m.p if isinstance(m, nn.Dropout) else getattr(m, "attention_dropout", 0.0) for m in model.modules()]
    return any(isinstance(rate, int | float) and rate > 0 for rate in rates)
