"""Sketches of the reference's gradients as stored rows: columns, what is refused, identity, reading."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cache.errors import CacheCorrupt, CacheMismatch
from cache.identity import Identity, ReferenceIdentity
from cache.key_set import KeyArray, key_array
from cache.manifest import Manifest, read_manifest
from cache.opening import open_rows
from cache.reference import StoredRows
from cache.schema import KEY_COLUMN, LOGPS, Kind, refuse

SKETCHES, STAGE = "sketches", "sketch"
NONE = "none"  # mode of a publication without rows, where no variant needs sketches
ENGINE = "engine"  # source of sketches that no backward pass made
AUDIT = "audit"
SHARD_BYTES, ROW_GROUP_BYTES = 256 << 20, 16 << 20  # before compression; a row may be 50 KB and more
LARGEST = 15  # exponent: the largest number of a row and group is stored as 2^14 to 2^15, well inside float16

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class SketchIdentity(Identity):
    """What determines a sketch. Which hardware, batch or release of a library took the gradient is left out.

    weights, config: as of ReferenceIdentity. trainable: the choice of parameters, canonical JSON. adapter_init: hex
    digest of a fresh LoRA's tensors, or None: gradients of B depend on the random A. mode: "tensorsketch", "exact", or
    "none" with all else None. k: numbers per group, None for exact. audit: numbers of the audit sketch. seed and
    hash_version: of the hashes. dtype: of weights and activations. groups: {group: numbers}, canonical JSON. source:
    None for a backward pass; "engine" for the output head alone, from the states of the engine that scores.
    """

    mismatch: ClassVar[str] = (
        "Sketches of other parameters, or of another model, say nothing about the gradients of this one. "
        "Run `dvc repro sketch`, or set the parameters back."
    )
    values: ClassVar[tuple[type, ...]] = (str, int, type(None))
    later: ClassVar[tuple[str, ...]] = ("source",)

    weights: str | None = None
    config: str | None = None
    trainable: str | None = None
    adapter_init: str | None = None
    mode: str
    k: int | None = None
    audit: int | None = None
    seed: int | None = None
    hash_version: int | None = None
    dtype: str | None = None
    groups: str | None = None
    source: str | None = None

    @property
    def widths(self) -> dict[str, int]:
        """Numbers per group, in the order of the columns."""
        widths: dict[str, int] = json.loads(self.groups or "{}")
        return widths

    @property
    def kind(self) -> Kind:
        return sketch_kind(self.widths | ({AUDIT: self.audit} if self.audit else {}))


def canonical_json(value: Any) -> str:
    """One text for one value; of a mapping, the order counts and is kept."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=True)


def scale_column(group: str) -> str:
    return f"{group}_scale"


def sketch_kind(widths: Mapping[str, int]) -> Kind:
    """The columns for these groups (the audit among them): per group a list of float16 and its float32 scale."""
    fields = [pa.field(KEY_COLUMN, pa.binary(16), nullable=False), pa.field("grad_norm", pa.float32(), nullable=False)]
    for group, width in widths.items():
        numbers, scale = pa.list_(pa.field("element", pa.float16(), nullable=False), width), scale_column(group)
        fields += [pa.field(group, numbers, nullable=False), pa.field(scale, pa.float32(), nullable=False)]
    row_bytes = 20 + sum(2 * width + 4 for width in widths.values())
    return Kind(
        name=SKETCHES,
        schema=pa.schema(fields),
        dictionary=[],
        byte_stream_split=[f"{group}.list.element" for group in widths],
        check=lambda table: check_sketches(table, widths),
        noun="sketches",
        stage=STAGE,
        shard_rows=max(1, min(50_000, SHARD_BYTES // row_bytes)),
        row_group_rows=max(1, min(2000, ROW_GROUP_BYTES // row_bytes)),
    )


def check_sketches(table: pa.Table, widths: Mapping[str, int]) -> None:
    """Raise CacheError, naming the row's key, for a number that is not finite or a scale that is no power of two."""
    for batch in table.to_batches():
        if not batch.num_rows:
            continue
        norms = batch["grad_norm"].to_numpy()
        refuse(batch, ~(np.isfinite(norms) & (norms >= 0)), "has a gradient norm that is negative or not finite")
        for group in widths:
            broken = (~np.isfinite(_numbers(batch[group]))).any(axis=1)
            refuse(batch, np.asarray(broken), f"has numbers in {group} that are not finite")
            scale = batch[scale_column(group)].to_numpy()
            sound = np.isfinite(scale) & (scale > 0) & (np.frexp(scale)[0] == 0.5)
            refuse(batch, ~sound, f"has a {scale_column(group)} that is no power of two")


def _numbers(column: Any) -> npt.NDArray[np.float16]:
    """A column of fixed-size lists as (rows, width)."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    flat: npt.NDArray[np.float16] = column.flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(-1, column.type.list_size)


def sketches_table(keys: list[bytes], grad_norms: Floats, values: Mapping[str, Floats]) -> pa.Table:
    """Rows from float32 numbers: values of each group, the audit among them, (rows, width).

    A power of two scales each row and group, so float16 rounds each number by at most 2^-11 of itself, or 2^-39 of the
    group's largest.
    """
    columns = {KEY_COLUMN: pa.array(keys, pa.binary(16)), "grad_norm": pa.array(grad_norms, pa.float32())}
    kind = sketch_kind({group: numbers.shape[1] for group, numbers in values.items()})
    for group, numbers in values.items():
        largest = np.abs(numbers).max(axis=1, initial=0)
        exponents = np.where(largest > 0, np.frexp(largest)[1] - LARGEST, 0)
        scale = np.ldexp(np.float32(1), np.maximum(exponents, -126)).astype(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused when it is written
            stored = (numbers / scale[:, None]).astype(np.float16)
        columns[group] = pa.FixedSizeListArray.from_arrays(pa.array(stored.ravel()), numbers.shape[1])
        columns[scale_column(group)] = pa.array(scale)
    return pa.table([columns[field.name].cast(field.type) for field in kind.schema], schema=kind.schema)


def group_values(table: pa.Table, group: str) -> Floats:
    """The numbers of a group with their scale applied, (rows, width) float32."""
    scale: Floats = table[scale_column(group)].to_numpy().astype(np.float32)
    scaled: Floats = _numbers(table[group]).astype(np.float32) * scale[:, None]
    return scaled


@dataclass(frozen=True)
class Sketches(StoredRows):
    """Published sketches. Make it with `open_sketches`."""

    identity: SketchIdentity

    def batches(self, groups: list[str]) -> Iterator[tuple[KeyArray, dict[str, Floats]]]:
        """Keys (rows,) and the numbers of `groups`, (rows, width) each, of all rows in the order of keys.

        A few row groups are in memory at a time.
        """
        columns = [name for group in groups for name in (group, scale_column(group))]
        for table in self.tables(columns):
            yield key_array(table[KEY_COLUMN]), {group: group_values(table, group) for group in groups}


def open_sketches(path: Path | str, *, expect: SketchIdentity | None, copies: Path | None = None) -> Sketches:
    """Open the sketches in folder or at address `path`; checks and raises as cache.open_reference."""
    return Sketches(*open_rows(path, SKETCHES, STAGE, SketchIdentity.from_dict, expect, copies))


def stored_kind(folder: Path) -> str:
    """The kind that the manifest in `folder` states or, where it can't be read, the names of the shards.

    Raises CacheIncomplete for a folder that was never published, CacheMismatch for one of a newer version.
    """
    try:
        return read_manifest(folder).kind
    except CacheCorrupt:
        return SKETCHES if any(folder.glob(f"{SKETCHES}-*.parquet")) else LOGPS.name


def writing_stage(kind: str) -> str:
    """The stage of dvc.yaml that publishes rows of this kind, for messages."""
    return STAGE if kind == SKETCHES else LOGPS.stage


def kind_of_columns(schema: pa.Schema) -> Kind:
    """The kind of journalled rows with these columns: sketches have lists of a fixed size."""
    widths = {field.name: field.type.list_size for field in schema if pa.types.is_fixed_size_list(field.type)}
    return sketch_kind(widths) if widths else LOGPS


def stated_identity(manifest: Manifest) -> Identity:
    """The identity in a manifest of any kind. Raises CacheMismatch for an unknown kind, and as `from_dict`."""
    known: dict[str, type[Identity]] = {LOGPS.name: ReferenceIdentity, SKETCHES: SketchIdentity}
    if manifest.kind not in known:
        raise CacheMismatch(f"unknown kind {manifest.kind!r}")
    identity = known[manifest.kind].from_dict(manifest.identity)
    try:
        assert identity.kind
    except (ValueError, TypeError) as error:
        raise CacheCorrupt(f"the identity's groups can't be read: {error}") from error
    return identity
