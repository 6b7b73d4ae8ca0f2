"""Which reference a stored row belongs to: everything that determines its numbers, and nothing else."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

from cache.durable import write_durably
from cache.errors import CacheCorrupt, CacheError, CacheMismatch, system_errors
from cache.schema import LOGPS, Kind

SHOWN = 12  # characters of a digest in a message
IDENTITY = "identity.json"  # beside a journal: what its reference_id stands for


@dataclass(frozen=True, kw_only=True)
class Identity(ABC):
    """What every kind of stored rows has: fields that determine the numbers, and a digest of them.

    mismatch: what another identity than the expected one means, and what to do about it, in sentences.
    """

    mismatch: ClassVar[str]
    values: ClassVar[tuple[type, ...]] = (str, type(None))  # types that a field may have
    # Fields that came later. Where they are null they are not written: neither the bytes of what was published before
    # nor an older reader notices them.
    later: ClassVar[tuple[str, ...]] = ()

    @property
    @abstractmethod
    def kind(self) -> Kind:
        """The kind of rows that are stored under this identity."""

    @property
    def reference_id(self) -> str:
        """32 hex characters; equal exactly when all fields are equal."""
        return identity_digest(self.to_dict())

    def to_dict(self) -> dict[str, str | int | None]:
        return {name: value for name, value in asdict(self).items() if value is not None or name not in self.later}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`. Unknown fields raise CacheMismatch, absent or malformed ones CacheCorrupt."""
        names = [field.name for field in fields(cls)]
        if unknown := sorted(set(values) - set(names)):
            raise CacheMismatch(f"the identity has the fields {unknown}, unknown to this version; upgrade refcache")
        values = dict.fromkeys(cls.later) | dict(values)
        wrong = [name for name in names if name not in values or not isinstance(values[name], cls.values)]
        if wrong:
            raise CacheCorrupt(f"the identity lacks {wrong}, or they are of the wrong type")
        return cls(**values)

    def differences(self, other: "Identity") -> dict[str, tuple[Any, Any]]:
        """{field: (mine, other's)} of the fields that differ, in the order of declaration."""
        mine, theirs = asdict(self), asdict(other)
        return {name: (mine[name], theirs[name]) for name in mine if mine[name] != theirs[name]}


SomeIdentity = TypeVar("SomeIdentity", bound=Identity)


@dataclass(frozen=True, kw_only=True)
class ReferenceIdentity(Identity):
    """What determines a reference's log-probs. Paths, seeds, learning rates and objectives are deliberately absent.

    weights, config: hex digests of the content of the weight files and of the model's config; adapter: likewise of a
    LoRA adapter, or None; dtype: the engine's compute type ("float32"); quantization: its name, or None; engine and
    engine_version: who computed ("vllm", "0.32.0").
    """

    mismatch: ClassVar[str] = (
        "Rewards would be measured against a model that the policy did not start from. "
        "Run `dvc repro score`, or point the parameters back at the reference that was scored."
    )

    weights: str
    config: str
    adapter: str | None
    dtype: str
    quantization: str | None
    engine: str
    engine_version: str

    @property
    def kind(self) -> Kind:
        return LOGPS


def identity_digest(identity: Mapping[str, Any]) -> str:
    """Digest of an identity in canonical JSON, 32 hex characters.

    Null fields are left out, so that an optional field added later does not rename every reference that lacks it.
    """
    present = {name: value for name, value in identity.items() if value is not None}
    canonical = json.dumps(present, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.blake2b(canonical.encode(), digest_size=16, person=b"refcache").hexdigest()


def require_identity(path: object, found: Identity, expected: Identity) -> None:
    """Raise CacheMismatch, naming each differing field with both values, unless the identities are equal."""
    differences = found.differences(expected)
    if not differences:
        return
    lines = [
        f"  {name}: found {short_digest(mine)}, expected {short_digest(theirs)}"
        for name, (mine, theirs) in differences.items()
    ]
    raise CacheMismatch(
        f"{path} holds the {expected.kind.noun} of another reference:\n" + "\n".join(lines) + f"\n{expected.mismatch}"
    )


def record_identity(folder: Path, identity: Identity) -> None:
    """Write identity.json into a journal's folder, unless it is there: a digest alone could not be explained later."""
    path = folder / IDENTITY
    if not path.exists():
        content = json.dumps(identity.to_dict(), indent=2, sort_keys=True, ensure_ascii=True) + "\n"
        with system_errors(f"write {path}", kept="The journal is intact."):
            write_durably(path, content.encode())


def recorded_identity(folder: Path, kind: type[SomeIdentity]) -> SomeIdentity | None:
    """What `record_identity` wrote; None where that is absent or can't be read, since it only serves explanations."""
    try:
        return kind.from_dict(json.loads((folder / IDENTITY).read_bytes()))
    except (OSError, ValueError, TypeError, CacheError):
        return None


def short_digest(value: str | int | None) -> str:
    """A field's value for people: the beginning of a digest, or "none"."""
    if value is None:
        return "none"
    if isinstance(value, int):
        return str(value)
    is_digest = len(value) > SHOWN and all(c in "0123456789abcdef" for c in value)
    return value[:SHOWN] if is_digest else value
