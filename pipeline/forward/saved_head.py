"""A model's output head alone, out of its safetensors folder: from final hidden states to log-probs."""

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from pipeline.errors import RequestError
from pipeline.forward.head import ChunkedHead
from pipeline.model.digests import tensor_files
from pipeline.model.opening import model_of_config
from pipeline.model.parts import canonical_name


def load_output_head(model: Path, chunk_tokens: int, *, trust_remote_code: bool = False) -> ChunkedHead:
    """The head in float32, from its own weights or the embeddings it is tied to; nothing else is loaded.

    Raises ValueError for a head that is not one linear layer, or whose weights aren't found by name.
    """
    shell, output = _shell(model, trust_remote_code)
    files = tensor_files(model)
    for part, parameter in list(output.named_parameters()):
        names = [name for name, other in shell.named_parameters(remove_duplicate=False) if other is parameter]
        name = next((name for name in names if name in files), None)
        if name is None:
            raise ValueError(f"{model}: none of the head's tensors {names} is in its safetensors files")
        with safe_open(files[name], framework="pt") as file:
            tensor = file.get_tensor(name)
        if not tensor.is_floating_point() or tensor.shape != parameter.shape:
            raise ValueError(f"{model}: {name} is {tensor.dtype} of {tuple(tensor.shape)}, no plain head")
        setattr(output, part, nn.Parameter(tensor.float(), requires_grad=False))
    return ChunkedHead(shell, chunk_tokens).eval()


class HeadParameters(NamedTuple):
    """names: {attribute of the head: the parameter's canonical name}. tied: whether the embeddings share its weight."""

    names: dict[str, str]
    tied: bool


def head_parameters(model: Path, *, trust_remote_code: bool = False) -> HeadParameters:
    """Parameters of this folder's output head, named as where gradients are taken; no weight is read.

    Raises RequestError for a head that is not one linear layer.
    """
    try:
        shell, output = _shell(model, trust_remote_code)
    except (OSError, ValueError) as error:
        raise RequestError(f"sketch.source: engine: {error}") from None
    # A shared parameter goes by the first of its names, as in named_parameters().
    name_of = {id(parameter): canonical_name(name) for name, parameter in shell.named_parameters()}
    names = {attribute: name_of[id(parameter)] for attribute, parameter in output.named_parameters()}
    return HeadParameters(names, output.weight is shell.get_input_embeddings().weight)


def _shell(model: Path, trust_remote_code: bool) -> tuple[PreTrainedModel, nn.Linear]:
    """The model without storage, and its head. Raises ValueError for a head that is not one linear layer."""
    with torch.device("meta"):
        shell = model_of_config(model, trust_remote_code=trust_remote_code)
    output = shell.get_output_embeddings()
    if not isinstance(output, nn.Linear):
        raise ValueError(f"{model}: the output head is a {type(output).__name__}, expected nn.Linear")
    return shell, output
