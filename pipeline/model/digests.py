"""What makes a transformers folder the same model: digests of its tensors and config, whatever its files are called."""

import hashlib
import json
import mmap
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.errors import RequestError

# Written by transformers, but changing none of the model's numbers.
_VOLATILE_CONFIG_KEYS = {"_name_or_path", "_commit_hash", "transformers_version", "torch_dtype", "dtype", "use_cache"}
_VOLATILE_ADAPTER_KEYS = {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision"}
_LFS = b"version https://git-lfs.github.com/spec/"


class StoredTensor(NamedTuple):
    """Where a tensor lies in a safetensors file, and as what."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int  # bytes from the beginning of the file
    stop: int


def weights_digest(folder: Path) -> str:
    """Hex digest over (name, dtype, shape, bytes) of all tensors; moving or re-sharding the files changes nothing."""
    tensors = sorted(stored_tensors(folder))
    for tensor, following in pairwise(tensors):
        if tensor.name == following.name:
            raise RequestError(
                f"{folder} holds tensor {tensor.name} twice, in {tensor.file.name} and {following.file.name}. "
                "Two models seem to share the folder; keep the files of one."
            )
    return _tensors_digest(tensors).hexdigest()


def adapter_digest(folder: Path) -> str:
    """Hex digest of a peft adapter: of its tensors, and of what its config says about the computation.

    Raises RequestError where either file is absent or can't be read.
    """
    file, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
        total = _tensors_digest(sorted(tensors_of(file)))
    except (OSError, ValueError) as error:
        raise RequestError(
            f"{folder} can't be read as a peft adapter: {error}. Expected are adapter_config.json and "
            "adapter_model.safetensors, as `refcache train` writes them (run `dvc repro train`)."
        ) from None
    stable = {key: value for key, value in content.items() if key not in _VOLATILE_ADAPTER_KEYS}
    total.update(json.dumps(stable, sort_keys=True).encode())
    return total.hexdigest()


def _tensors_digest(tensors: Sequence[StoredTensor]) -> "hashlib.blake2b":
    total = hashlib.blake2b(digest_size=16)
    with ThreadPoolExecutor() as pool:  # hashlib releases the interpreter lock
        for tensor, content in zip(tensors, pool.map(_content_digest, tensors), strict=True):
            head = json.dumps([tensor.name, tensor.dtype, tensor.shape]).encode()
            total.update(len(head).to_bytes(4, "little") + head + content)
    return total


def config_digest(folder: Path) -> str:
    """Hex digest of config.json without volatile keys, and of the Python files beside it if it names any."""
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError(
            f"{file} can't be read as a transformers config: {error}. "
            "score wants a model folder with config.json and *.safetensors, as `refcache sft` writes it."
        ) from None
    total = hashlib.blake2b(json.dumps(_stable(config), sort_keys=True).encode(), digest_size=16)
    if "auto_map" in config:
        for code in sorted(folder.glob("*.py")):
            total.update(code.name.encode() + b"\0" + hashlib.blake2b(code.read_bytes()).digest())
    return total.hexdigest()


def _stable(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: _stable(inner)
            for key, inner in value.items()
            if key not in _VOLATILE_CONFIG_KEYS and not key.startswith("_attn_implementation")
        }
    return [_stable(inner) for inner in value] if isinstance(value, list) else value


def tensor_files(folder: Path) -> dict[str, Path]:
    """The safetensors file of each tensor by name; raises as `weights_digest`."""
    return {tensor.name: tensor.file for tensor in stored_tensors(folder)}


def stored_tensors(folder: Path) -> list[StoredTensor]:
    """Every tensor of the folder's safetensors files, from their headers; raises as `weights_digest`."""
    return [tensor for file in _weight_files(folder) for tensor in tensors_of(file)]


def _weight_files(folder: Path) -> list[Path]:
    """The files that transformers and vLLM would load: those of the index where there is one."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        absent = [file.name for file in files if not file.exists()]
        if absent:
            raise RequestError(f"{index} lists {absent}, which the folder lacks. Copy or download the model again.")
        return files
    files = sorted(file for file in folder.glob("*.safetensors") if not file.name.startswith("adapter_"))
    if files:
        return files
    if any(folder.glob("*.bin")):
        raise RequestError(
            f"{folder} has PyTorch .bin weights only, which can't be digested by tensor, and can run code when loaded. "
            "Save it once as safetensors: from_pretrained(...).save_pretrained(...) in transformers, or `refcache sft`."
        )
    raise RequestError(f"{folder} has no *.safetensors. It is written by `refcache sft` (run `dvc repro sft`).")


def refuse_pointer(file: Path) -> None:
    """RequestError for what a clone without Git LFS leaves in a file's place."""
    with file.open("rb") as stream:
        if stream.read(len(_LFS)) == _LFS:
            raise RequestError(
                f"{file} is a Git LFS pointer, not the file itself. Run `git lfs install && git lfs pull` where it was "
                "cloned, or download the model again."
            )


def tensors_of(file: Path) -> list[StoredTensor]:
    """The header of a safetensors file: uint64 length, then JSON with dtype, shape and offsets behind the header."""
    refuse_pointer(file)
    size = file.stat().st_size
    with file.open("rb") as stream:
        try:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > size - 8:
                raise ValueError(f"header of {length} bytes in a file of {size}")
            header = json.loads(stream.read(length))
        except (struct.error, ValueError) as error:
            raise RequestError(f"{file} is no safetensors file: {error}. Copy or download the model again.") from None
    header.pop("__metadata__", None)
    base = 8 + length
    tensors = [
        StoredTensor(name, entry["dtype"], tuple(entry["shape"]), file, *(base + at for at in entry["data_offsets"]))
        for name, entry in header.items()
    ]
    end = max((tensor.stop for tensor in tensors), default=base)
    if end > size:
        raise RequestError(f"{file} is cut short: {size} bytes, its header promises {end}. Copy the model again.")
    return tensors


def _content_digest(tensor: StoredTensor) -> bytes:
    digest = hashlib.blake2b(digest_size=32)
    if tensor.start < tensor.stop:  # an empty tensor can't be mapped in a file that ends there
        with (
            tensor.file.open("rb") as stream,
            mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content,
            memoryview(content) as view,
            view[tensor.start : tensor.stop] as part,
        ):
            digest.update(part)
    return digest.digest()
