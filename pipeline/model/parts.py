"""Where the parts of a transformers causal language model are, whatever its architecture and wrapping call them."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from pipeline.errors import RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_NOISE = re.compile("drop|jitter")  # dropout, layerdrop, resid_pdrop, drop_path_rate; router_jitter_noise


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
    """Nothing random in training mode (which activation checkpointing needs): the reference was scored without.

    Not every dropout is a module: OPT hands a number to a function, Falcon one out of its config, and Mixtral's router
    adds noise by another. A LoRA's own dropout, which the reference never had, stays. forward/steadiness.py tries
    whether this was all. `saved_config` gives the config its numbers back while it is saved.
    """
    inner = causal_model(model)
    configs = {id(config): config for config in _configs(model)}
    inner._silenced = [(config, _rates(config)) for config in configs.values()]
    silenced = [m for path, m in model.named_modules() if "lora_dropout" not in path]
    for owner in (*silenced, *configs.values()):
        for name in _rates(owner):
            setattr(owner, name, 0.0)
    return model


@contextmanager
def saved_config(model: nn.Module) -> Iterator[None]:
    """Within, the config holds the rates that `disable_dropout` took out of it."""
    silenced: Any = getattr(causal_model(model), "_silenced", ())
    for config, rates in silenced:
        for name, rate in rates.items():
            setattr(config, name, rate)
    try:
        yield
    finally:
        for config, rates in silenced:
            for name in rates:
                setattr(config, name, 0.0)


def _configs(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        config = vars(module).get("config")
        if config is not None and hasattr(config, "get_text_config"):
            yield from (config, config.get_text_config())


def has_dropout(model: nn.Module) -> bool:
    """Whether a forward in training mode would drop anything, by whatever kind of layer."""
    return any(_rates(module) for module in model.modules())


def _rates(owner: Any) -> dict[str, float]:
    """The numbers above zero by which a module, or modules by this config, drop values or add noise in training."""
    dropout = isinstance(owner, _DropoutNd)
    return {
        name: value
        for name, value in vars(owner).items()
        if isinstance(value, float) and value > 0 and (_NOISE.search(name) or (dropout and name == "p"))
    }
