"""Which layers a LoRA lies on: exactly those that `trainable.lora` asks for, by their full names, or an error."""

from collections import Counter

from torch import nn
from transformers.pytorch_utils import Conv1D

from pipeline.errors import RequestError
from pipeline.model.parts import causal_model, transformer_blocks
from pipeline.params import LoraShape

_ADAPTABLE = (nn.Linear, Conv1D, nn.Embedding)
# Layers that choose experts. Training them changes which experts a token goes to, and nobody means them by "linear".
_ROUTERS = {"gate", "router", "shared_expert_gate", "wg"}
# What experts' layers are called where they are layers.
_EXPERT_LAYERS = {"gate_proj", "up_proj", "gate_up_proj", "down_proj", "w1", "w2", "w3"}
_MLP_PATHS = {"mlp", "feed_forward", "block_sparse_moe"}
_SHOWN = 12


def lora_modules(model: nn.Module, shape: LoraShape) -> list[str]:
    """Full names of the modules to adapt, in the model's order. model: a transformers causal LM without adapter.

    Raises RequestError where a target matches nothing, where it is the output head, and for experts that are fused into
    one parameter, which are no layers.
    """
    inner = causal_model(model)
    within = _block_prefixes(inner, shape)
    layers = {
        name: module
        for name, module in inner.named_modules()
        if isinstance(module, _ADAPTABLE) and (within is None or name.startswith(within))
    }
    if isinstance(shape.targets, str):
        return _of_group(inner, layers, shape.targets)
    chosen: set[str] = set()
    for target in shape.targets:
        matching = {name for name in layers if name == target or name.endswith(f".{target}")}
        if not matching or (target in _EXPERT_LAYERS and _fused(inner)):
            raise RequestError(_no_match(inner, layers, target, shape))
        chosen |= matching
    _refuse_head(inner, {name: layers[name] for name in chosen})
    return [name for name in layers if name in chosen]


def require_adapted(model: nn.Module, wanted: list[str]) -> None:
    """RequestError unless peft put its factors on these modules and no other."""
    found = set(_adapted(model))
    if found != set(wanted):
        raise RequestError(
            f"trainable.lora: peft adapted {sorted(found - set(wanted))[:_SHOWN]} beside what was asked for, and left "
            f"out {sorted(set(wanted) - found)[:_SHOWN]}. Choose other trainable.lora.targets."
        )


def count_adapted(model: nn.Module) -> dict[str, int]:
    """{last part of a layer's name: how many layers of that name have LoRA factors}; empty without LoRA."""
    return dict(Counter(name.rsplit(".", 1)[-1] for name in _adapted(model)))


def _adapted(model: nn.Module) -> list[str]:
    return [name for name, module in causal_model(model).named_modules() if getattr(module, "lora_A", None) is not None]


def _block_prefixes(model: nn.Module, shape: LoraShape) -> tuple[str, ...] | None:
    """Beginnings of the names of modules in the blocks that are meant; None for the whole model."""
    if shape.blocks == "all" and not isinstance(shape.targets, str):
        return None
    blocks = list(transformer_blocks(model))
    wanted = {id(block) for block in (blocks if shape.blocks == "all" else blocks[-1:])}
    return tuple(f"{name}." for name, module in model.named_modules() if id(module) in wanted)


def _of_group(model: nn.Module, layers: dict[str, nn.Module], group: str) -> list[str]:
    modules = dict(model.named_modules())
    wanted = {"attention": {"attention"}, "mlp": {"mlp"}, "all-linear": {"attention", "mlp", "other"}}[group]
    fused = [name for name in _fused(model) if _kind(name, modules) in wanted]
    if fused:
        raise RequestError(
            f"trainable.lora.targets: {group}: the experts of {type(model).__name__} are fused parameters "
            f"({', '.join(fused[:2])}), not layers, and can't be adapted. Name layers, set targets: attention, or set "
            "trainable: all."
        )
    linear = [name for name, layer in layers.items() if not isinstance(layer, nn.Embedding)]
    found = [name for name in linear if _kind(name, modules) in wanted]
    if not found:
        raise RequestError(
            f"trainable.lora.targets: {group}: {type(model).__name__} has no such layer. {_own_names(layers)}"
        )
    return found


def _kind(name: str, modules: dict[str, nn.Module]) -> str:
    """attention, mlp, router or other, by the classes around the layer; blocks like OPT's have their MLP bare."""
    parts = name.split(".")
    if parts[-1] in _ROUTERS:
        return "router"
    around = [type(modules[".".join(parts[:end])]).__name__.lower() for end in range(len(parts) - 1, 0, -1)]
    for parent in around:
        if parent == "modulelist":
            break
        if "router" in parent:
            return "router"
        if "attention" in parent:
            return "attention"
        if any(word in parent for word in ("mlp", "feedforward", "ffn")):
            return "mlp"
    bare = parts[-1].startswith("fc")
    return "mlp" if bare or any(part in _MLP_PATHS or "expert" in part for part in parts) else "other"


def _fused(model: nn.Module) -> list[str]:
    """Names of parameters that hold one matrix for each expert of a block."""
    found = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.Conv1d):
            own = {name: getattr(p, "ds_shape", p.shape) for name, p in module.named_parameters(recurse=False)}
            found += [f"{path}.{name}" for name, shape in own.items() if len(shape) == 3]  # ds: divided by ZeRO-3
    return found


def _no_match(model: nn.Module, layers: dict[str, nn.Module], target: str, shape: LoraShape) -> str:
    fused = _fused(model)
    if fused and target in _EXPERT_LAYERS:
        return (
            f"trainable.lora.targets: {target!r}: the experts of {type(model).__name__} are fused parameters "
            f"({', '.join(fused[:2])}), which can't be adapted. Leave it out, or name a layer of the same name that is "
            f"no expert with its parent (shared_expert.{target}). {_own_names(layers)}"
        )
    where = "in its last block" if shape.blocks == "last" else "in it"
    return (
        f"trainable.lora.targets: {target!r} is no layer of {type(model).__name__}: no linear layer or embedding "
        f"{where} has that name. {_own_names(layers)}"
    )


def _own_names(layers: dict[str, nn.Module]) -> str:
    names = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in layers))
    return f"Its layers are {', '.join(names)}; targets may also be attention, mlp or all-linear."


def _refuse_head(model: nn.Module, chosen: dict[str, nn.Module]) -> None:
    head = model.get_output_embeddings()  # type: ignore[operator]  # a transformers model
    named = [name for name, module in chosen.items() if module is head]
    if named:
        raise RequestError(
            f"trainable.lora.targets: {named[0]} is the output head, whose log-probs are computed in chunks from whole "
            "weights, so it can't have an adapter. Leave it out, or train it as a whole with trainable: head."
        )
