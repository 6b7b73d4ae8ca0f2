"""Saving what was trained: tried before the first step, since a model that can't be saved need not be trained."""

import shutil
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.errors import RunFailed
from pipeline.model.adapters import open_adapter
from pipeline.model.digests import StoredTensor, stored_tensors, tensors_of
from pipeline.model.folders import save_model
from pipeline.model.opening import listed, open_model
from pipeline.model.parts import causal_model
from pipeline.training.deepspeed_engine import Engine
from pipeline.training.job import Job

ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PIECE = 1 << 24  # bytes


def try_saving(model: nn.Module, engine: Engine, job: Job, work: Path) -> None:
    """Save the untrained model as `save_trained` will, and open it again; nothing is left of it. Collective.

    Raises RequestError or RunFailed where it can't be saved, or doesn't come back with the same tensors.
    """
    state = _state(model, engine)
    if engine.rank == 0:
        folder = work / "untrained"
        save_model(model, state, _tokenizer(job), folder, prove=partial(_require_same, job=job, state=state))
        shutil.rmtree(folder)


def save_trained(model: nn.Module, engine: Engine, job: Job, folder: Path) -> None:
    """Write the model, or of a LoRA its adapter, to `folder` on rank 0. Collective.

    Raises RunFailed where the file does not hold the tensors that were trained.
    """
    state = _state(model, engine)
    if engine.rank == 0:
        save_model(model, state, _tokenizer(job), folder, prove=partial(_require_stored, model=model, state=state))


def _state(model: nn.Module, engine: Engine) -> dict[str, Tensor]:
    return engine.gathered_state(model, trained_only=causal_model(model) is not model)


def _tokenizer(job: Job) -> Path:
    return Path(job.paths["tokenizer"])


def _require_same(folder: Path, *, job: Job, state: dict[str, Tensor]) -> None:
    """RunFailed unless the folder, opened as later stages do, holds `state` (by the model's names)."""
    opened: nn.Module
    code = job.settings.get("trust_remote_code", job.settings.get("model", {}).get("trust_remote_code", False))
    if (folder / ADAPTER_WEIGHTS).exists():
        base = open_model(Path(job.paths["model"]), dtype=torch.float32, trust_remote_code=code)
        opened = open_adapter(base, folder, failed=f"{job.title}: the adapter can't be opened again")
    else:
        opened = open_model(folder, dtype=torch.float32, trust_remote_code=code)
    found = opened.state_dict()
    _judge(folder, [name for name, tensor in state.items() if not _equal(found.get(name), tensor)])


def _require_stored(folder: Path, *, model: nn.Module, state: dict[str, Tensor]) -> None:
    """As `_require_same`, without a second model in memory: by the names in the file, where these are the model's.

    What is stored under another name, as transformers does for some mixtures of experts, was compared before training.
    """
    if causal_model(model) is model:
        stored, expected = {tensor.name: tensor for tensor in stored_tensors(folder)}, state
    else:
        from peft import get_peft_model_state_dict

        stored = {tensor.name: tensor for tensor in tensors_of(folder / ADAPTER_WEIGHTS)}
        expected = get_peft_model_state_dict(model, state_dict=state, save_embedding_layers=False)
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
