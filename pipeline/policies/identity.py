"""Which model an answer belongs to: a trained policy, or the reference itself."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

from cache import ReferenceIdentity
from pipeline.errors import RequestError
from pipeline.model.digests import adapter_digest, config_digest, stored_tensors, weights_digest
from pipeline.model.opening import ADAPTER_CONFIG

Shape = tuple[str, tuple[tuple[str, str, tuple[int, ...]], ...]]  # digest of the config; name, dtype, shape of tensors


class Policy(NamedTuple):
    """name: in messages and log files. folder: whole weights, or a peft adapter of the reference."""

    name: str
    folder: Path
    identity: ReferenceIdentity

    @property
    def is_adapter(self) -> bool:
        return self.identity.adapter is not None

    @property
    def shape(self) -> Shape:
        """Equal where one engine's tensors can hold the weights of either folder."""
        return folder_shape(self.folder)


def open_policy(name: str, folder: Path, reference: ReferenceIdentity) -> Policy:
    """The policy in `folder`, computed with as the reference is. Reads its weights once.

    Raises RequestError for a folder that is absent or holds neither a safetensors model nor an adapter.
    """
    if not folder.is_dir():
        raise RequestError(f"{folder} does not exist; it is written by `refcache train` (run `dvc repro train`).")
    if (folder / ADAPTER_CONFIG).exists():
        return Policy(name, folder, dataclasses.replace(reference, adapter=adapter_digest(folder)))
    weights, config = weights_digest(folder), config_digest(folder)
    return Policy(name, folder, dataclasses.replace(reference, weights=weights, config=config))


def folder_shape(folder: Path) -> Shape:
    """What an engine is built by: the config, and the tensors' names, dtypes and shapes, from the files' headers."""
    tensors = sorted((tensor.name, tensor.dtype, tensor.shape) for tensor in stored_tensors(folder))
    return config_digest(folder), tuple(tensors)
