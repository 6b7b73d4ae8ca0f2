"""Saving what was trained: tried before the first step, since a model that can't be saved need not be trained."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.errors import RunFailed
from pipeline.model.digests import StoredTensor, stored_tensors, tensors_of
from pipeline.model.generation import make_savable
from pipeline.model.opening import listed, open_model
from pipeline.model.parts import causal_model, saved_config
from pipeline.trainable.adapters import open_adapter

ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PIECE = 1 << 24  # bytes


class Trained(NamedTuple):
    """What is saved. state: tensors by the model's names, of a LoRA the adapter's alone; base: what a LoRA is of."""

    model: nn.Module
    state: dict[str, Tensor]
    tokenizer: Path
    base: Path | None
    trust_remote_code: bool


def try_saving(trained: Trained, folder: Path) -> None:
    """Save as `save_trained` will, and open it again as later stages do; nothing is left in `folder`.

    Raises RequestError or RunFailed where it can't be saved, or doesn't come back with the same tensors.
    """
    prove = partial(_require_same, trained=trained)
    save_model(trained.model, trained.state, trained.tokenizer, folder, prove=prove)
    shutil.rmtree(folder)


def save_trained(trained: Trained, folder: Path) -> None:
    """Write the model, or of a LoRA its adapter; RunFailed where the file does not hold what was trained."""
    prove = partial(_require_stored, trained=trained)
    save_model(trained.model, trained.state, trained.tokenizer, folder, prove=prove)


def save_model(
    model: nn.Module, state: dict[str, Tensor], tokenizer: Path, out: Path, *, prove: Callable[[Path], None]
) -> None:
    """Write `state` (the model's parameter names) with config and tokenizer to `out`, complete or not at all.

    prove: called with the written folder before it takes its place; raises where it is not what was meant.
    """
    make_savable(causal_model(model))
    building = out.with_name(f".{out.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    with saved_config(model):
        # peft's wrapper has the same method, and writes the adapter alone.
        cast(PreTrainedModel, model).save_pretrained(building, state_dict=state, safe_serialization=True)
    if causal_model(model) is model:
        copy_tokenizer(tokenizer, building)
    prove(building)
    shutil.rmtree(out, ignore_errors=True)
    building.rename(out)


def copy_tokenizer(tokenizer: Path, model: Path) -> None:
    """Put the tokenizer's files beside the weights, so that the folder works on its own.

    tokenizer: a folder with nothing else, or that of another model; a tokenizer of one's own may name files anyhow.
    """
    for file in sorted(tokenizer.iterdir()):
        weights = file.suffix in (".safetensors", ".bin") or file.name.endswith(".index.json")
        if file.is_file() and not weights and not (model / file.name).exists():
            shutil.copyfile(file, model / file.name)


def _require_same(folder: Path, *, trained: Trained) -> None:
    """RunFailed unless the folder, opened as later stages do, holds the state."""
    opened: nn.Module
    if (folder / ADAPTER_WEIGHTS).exists():
        assert trained.base is not None  # adapters are of something
        base = open_model(trained.base, dtype=torch.float32, trust_remote_code=trained.trust_remote_code)
        opened = open_adapter(base, folder, failed=f"{folder}, just written, can't be opened again")
    else:
        opened = open_model(folder, dtype=torch.float32, trust_remote_code=trained.trust_remote_code)
    found = opened.state_dict()
    _judge(folder, [name for name, tensor in trained.state.items() if not _equal(found.get(name), tensor)])


def _require_stored(folder: Path, *, trained: Trained) -> None:
    """As `_require_same`, without a second model in memory: by the names in the file, where these are the model's.

    What is stored under another name, as transformers does for some mixtures of experts, was compared before training.
    """
    if causal_model(trained.model) is trained.model:
        stored, expected = {tensor.name: tensor for tensor in stored_tensors(folder)}, trained.state
    else:
        from peft import get_peft_model_state_dict

        stored = {tensor.name: tensor for tensor in tensors_of(folder / ADAPTER_WEIGHTS)}
        expected = get_peft_model_state_dict(trained.model, state_dict=trained.state, save_embedding_layers=False)
    both = sorted(expected.keys() & stored.keys())
    _judge(folder, [name for name in both if not _holds(stored[name], expected[name])])


def _holds(stored: StoredTensor, tensor: Tensor) -> bool:
    """Byte by byte, in pieces: a mapped file would count as memory at the moment that training takes most."""
    content = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()
    if tuple(tensor.shape) != stored.shape or len(content) != stored.stop - stored.start:
        return False
    with stored.file.open("rb") as file:
        file.seek(stored.start)
        pieces = (content[at : at + _PIECE].tobytes() for at in range(0, len(content), _PIECE))
        return all(file.read(len(piece)) == piece for piece in pieces)


def _equal(found: Tensor | None, tensor: Tensor) -> bool:
    return found is not None and found.shape == tensor.shape and torch.equal(found, tensor.to(found.dtype))


def _judge(folder: Path, differing: list[str]) -> None:
    if differing:
        raise RunFailed(
            f"{folder} was written, and holds other numbers than the model in memory; tensors "
            f"{listed('that differ', differing)}. Nothing was published. The disk may be faulty, or the architecture "
            "one that transformers does not save as it loads it."
        )
