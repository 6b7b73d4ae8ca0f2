"""Which parameters are sketched together, and which modules can be sketched at all."""

from collections import Counter
from typing import NamedTuple

from torch import nn

from pipeline.errors import RequestError
from pipeline.model.parts import canonical_name, causal_model, transformer_blocks
from pipeline.sketches.head_plan import HEAD

EMBEDDINGS, FINAL_NORM, OTHER = "embeddings", "final_norm", "other"  # beside head_plan.HEAD and one for each block


class Layer(NamedTuple):
    """A module that owns trainable parameters. names: {attribute: the parameter's canonical name}, trainable ones."""

    module: nn.Module
    names: dict[str, str]


class TrainedParts(NamedTuple):
    """groups: of each trainable parameter by canonical name, in the model's order; layers: their modules but the head.

    head: of the output head, empty where it is frozen. tied: the name that head and embeddings share, or None.
    """

    groups: dict[str, str]
    parameters: dict[str, nn.Parameter]
    layers: list[Layer]
    head: dict[str, str]
    tied: str | None


def find_trained(model: nn.Module) -> TrainedParts:
    """What trains in a transformers causal LM (see select_trainable), by module and group.

    Raises RequestError naming every module with trainable parameters whose gradient can't be taken apart by example.
    """
    parameters = {canonical_name(n): p for n, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise RequestError("trainable: no parameter of the model trains, so there is no gradient to sketch.")
    name_of = {id(parameter): name for name, parameter in parameters.items()}
    inner = causal_model(model)
    output, embeddings = inner.get_output_embeddings(), inner.get_input_embeddings()
    layers, head, bad = [], {}, []
    for path, module in model.named_modules():
        own = module.named_parameters(recurse=False)
        names = {attribute: name_of[id(p)] for attribute, p in own if id(p) in name_of}
        if module is output:
            head = names
        elif names and is_supported(module):
            layers.append(Layer(module, names))
        elif names:
            bad.append(f"{canonical_name(path) or 'the model itself'} ({type(module).__name__}: {', '.join(names)})")
    uses = Counter(name for owner in [*(layer.names for layer in layers), head] for name in owner.values())
    tied = head.get("weight") if head.get("weight") == name_of.get(id(embeddings.weight)) else None
    bad += [f"{name} (shared by {count} modules)" for name, count in uses.items() if count > 1 + (name == tied)]
    if bad:
        raise RequestError(
            f"{type(causal_model(model)).__name__}: these trainable modules can't be sketched: {'; '.join(bad)}. "
            "Sketches know nn.Linear, nn.Embedding, RMSNorm and LayerNorm layers; choose a `trainable` without them "
            "(last_block, lora, ...)."
        )
    return TrainedParts(_groups(model, parameters), parameters, layers, head, tied)


def is_supported(module: nn.Module) -> bool:
    """Whether pipeline/sketches/collector.py can take the module's gradient apart by example."""
    kind = type(module)
    if kind.forward in (nn.Linear.forward, nn.LayerNorm.forward, nn.RMSNorm.forward):
        return all(p.dim() == 1 for name, p in module.named_parameters(recurse=False) if not is_matrix(module, name))
    if isinstance(module, nn.Embedding):
        plain = kind.forward is nn.Embedding.forward or kind.__name__.endswith("ScaledWordEmbedding")
        return plain and module.max_norm is None and not module.scale_grad_by_freq
    return is_elementwise_norm(module)


def is_matrix(module: nn.Module, attribute: str) -> bool:
    return attribute == "weight" and isinstance(module, nn.Linear | nn.Embedding)


def is_elementwise_norm(module: nn.Module) -> bool:
    """Whether this is one of transformers' RMSNorms, plain arithmetic on one vector `weight` along the last axis."""
    own = dict(module.named_parameters(recurse=False))
    return type(module).__name__.endswith("RMSNorm") and set(own) == {"weight"} and own["weight"].dim() == 1


def _groups(model: nn.Module, parameters: dict[str, nn.Parameter]) -> dict[str, str]:
    """Canonical name -> block_000, block_001, ..., embeddings, final_norm, head or other."""
    inner = causal_model(model)
    blocks = {id(block): number for number, block in enumerate(transformer_blocks(inner))}
    output = {id(p) for p in inner.get_output_embeddings().parameters()}
    kinds, prefixes = {}, {}
    for path, module in inner.named_modules():
        if id(module) in blocks:
            prefixes[f"{path}."] = f"block_{blocks[id(module)]:03d}"
        for attribute, _ in module.named_parameters(recurse=False):
            kinds[canonical_name(f"{path}.{attribute}")] = module
    found = {}
    for name, parameter in parameters.items():
        block = next((group for prefix, group in prefixes.items() if name.startswith(prefix)), None)
        owner = kinds.get(name)
        if block is not None:
            found[name] = block
        elif isinstance(owner, nn.Embedding):
            found[name] = EMBEDDINGS
        elif id(parameter) in output:
            found[name] = HEAD
        else:
            found[name] = FINAL_NORM if type(owner).__name__.endswith("Norm") else OTHER
    return found
