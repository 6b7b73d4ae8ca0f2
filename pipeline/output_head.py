"""A model's output head alone, out of its safetensors folder: from final hidden states to log-probs."""

from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.chunked_head import ChunkedHead
from pipeline.weights import tensor_files


def load_output_head(model: Path, chunk_tokens: int, *, trust_remote_code: bool = False) -> ChunkedHead:
    """The head in float32, from its own weights or the embeddings it is tied to; nothing else is loaded.

    Raises ValueError for a head that is not one linear layer, or whose weights aren't found by name.
    """
    config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        shell = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    output = shell.get_output_embeddings()
    if not isinstance(output, nn.Linear):
        raise ValueError(f"{model}: the output head is a {type(output).__name__}, expected nn.Linear")
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
