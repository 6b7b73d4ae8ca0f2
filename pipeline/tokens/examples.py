"""What policies train on as mapped arrays: of each pair its two responses, its prompt, its lengths, its reference sums.

Derived from the prepared tables and the published cache, named by their content, and shared by all ranks of a machine
and all runs of a sweep; like token ids, they can be deleted at any time (`refcache gc --views`).
"""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from cache import Reference, join_sum_logps
from cache.derived import build_once
from cache.errors import system_errors
from cache.key_set import KeyArray, key_column
from cache.manifest import MANIFEST
from pipeline.data.splitting import held_out_rows
from pipeline.data.tables import FEEDBACK_SIDES, PAIR_SIDES, scan_feedback, scan_pairs
from pipeline.tokens.view import TokenView, content_digest, mapped, open_token_view, require_built
from pipeline.workspace import scratch_folder, views_folder

EXAMPLES_VERSION = 1  # enters the names
SPLITS = ("train", "test")
# Of each split; shapes (n, 2), (n,), (n, 2), (n,), and desirable of feedback alone, (n,).
FILES: dict[str, np.dtype[Any]] = {
    "rows": np.dtype(np.int32),
    "groups": np.dtype(np.int64),
    "response_lengths": np.dtype(np.int64),
    "lengths": np.dtype(np.int64),
    "desirable": np.dtype(np.bool_),
}
TWO_SIDED = {"rows", "response_lengths"}
SUMS = "sums"
BATCH_ROWS = 1 << 15


class Places(NamedTuple):
    """Where a split's examples lie; plain strings, so that a job file can say them to ranks."""

    tokens: str
    examples: str
    split: str
    sums: str | None = None  # None: reference sums are not wanted
    most: int | None = None  # no more than so many examples, chosen by `held_out_rows`; None: all


class Examples:
    """The pairs of one split in the order of their table, or rows of feedback, each with its mismatched response.

    tokens: the token view whose rows they name. rows: (n, 2) int32, of chosen and rejected (feedback: labelled and
    mismatched) response. groups: (n,) int64, a number for each one's prompt, ascending with the prompts' keys.
    response_lengths: (n, 2); lengths: of both with their prompts, (n,); tokens, int64. desirable: (n,) bool, None for
    pairs. reference_sums: (n, 2) float64, nats, None where they were not asked for. Read-only, and mapped.
    """

    def __init__(self, places: Places) -> None:
        """Reads no file. Raises RunFailed where something removed what is mapped."""
        self.places = places
        self.tokens = TokenView(Path(places.tokens))
        folders = [Path(folder) for folder in (places.examples, places.sums) if folder]
        for folder in folders:
            require_built(folder)
        self.rows, self.response_lengths = self._array("rows"), self._array("response_lengths")
        self.groups, self.lengths = self._array("groups"), self._array("lengths")
        self.desirable = self._array("desirable") if (folders[0] / f"{places.split}-desirable").exists() else None
        sums = mapped(folders[1] / SUMS, np.float64).reshape(-1, 2) if places.sums else None
        self.reference_sums: npt.NDArray[np.float64] | None = sums

    def _array(self, name: str) -> npt.NDArray[Any]:
        values = mapped(Path(self.places.examples) / f"{self.places.split}-{name}", FILES[name])
        values = values.reshape(-1, 2) if name in TWO_SIDED else values
        most = self.places.most
        return values if most is None else values[held_out_rows(len(values), most)]

    def __len__(self) -> int:
        return len(self.rows)

    def keys(self, side: int) -> KeyArray:
        """Of the responses on one side, 0 or 1, (n,); a copy."""
        found: KeyArray = self.tokens.keys[self.rows[:, side]]
        return found

    @property
    def key_table(self) -> pl.DataFrame:
        """The keys as a table of PAIR_SIDES; a copy."""
        return pl.DataFrame({name: pl.from_arrow(key_column(self.keys(side))) for side, name in enumerate(PAIR_SIDES)})

    def key_batches(self) -> Iterator[pa.RecordBatch]:
        """As `key_table`, some rows at a time."""
        for start in range(0, len(self), BATCH_ROWS):
            rows = self.rows[start : start + BATCH_ROWS]
            columns = [key_column(self.tokens.keys[rows[:, side]]) for side in range(2)]
            yield pa.record_batch(columns, names=PAIR_SIDES)


def open_examples(pairs: Path, split: str, *, feedback: bool = False, most: int | None = None) -> Examples:
    """The examples of a split of a prepared folder, "train" or "test"; their files are made first if need be.

    Reads the tables whole for their digests: a stage does this once, and its ranks open `Examples.places`. Takes flat
    memory, and 36 bytes of disk an example. Raises RequestError without tables, CacheError when the system refuses.
    """
    (scan_feedback if feedback else scan_pairs)(pairs)
    table = pairs / ("feedback.parquet" if feedback else "pairs.parquet")
    tokens = open_token_view(pairs)
    kept = "The prepared tables are intact."
    with system_errors(f"build examples of {pairs} under {views_folder()}", kept=kept):
        name = f"{table.stem}-{content_digest(table)}-{tokens.path.name}"
        path = views_folder() / f"examples-{EXAMPLES_VERSION}-{name}"
        build_once(path, lambda partial: _write(partial, table, tokens, feedback=feedback))
    return Examples(Places(str(tokens.path), str(path), split, most=most))


def with_reference_sums(examples: Examples, reference: Reference) -> Examples:
    """The same with `reference_sums`, joined first if need be; 16 bytes of disk an example.

    Raises CacheIncomplete, naming how many are missing and the first few, unless `reference` has every response;
    otherwise as `join_sum_logps` and `open_examples`.
    """
    places = examples.places
    digest = hashlib.blake2b((reference.path / MANIFEST).read_bytes(), digest_size=16, person=b"refcache")
    digest.update(repr((Path(places.examples).name, places.split, places.most)).encode())
    path = views_folder() / f"sums-{EXAMPLES_VERSION}-{digest.hexdigest()}"

    def build(partial: Path) -> None:
        join_sum_logps(reference, examples.key_batches(), scratch=scratch_folder()).tofile(partial / SUMS)

    with system_errors(f"join reference sums under {views_folder()}", kept="The reference cache is intact."):
        build_once(path, build)
    return Examples(places._replace(sums=str(path)))


def _write(folder: Path, table: Path, tokens: TokenView, *, feedback: bool) -> None:
    order = tokens.prompt_keys.argsort(kind="stable")
    ranks = np.empty(len(order), np.int64)  # of prompts by key, which is the order that batches were always drawn in
    ranks[order] = np.arange(len(order))
    sides = FEEDBACK_SIDES if feedback else PAIR_SIDES
    names = [name for name in FILES if feedback or name != "desirable"]
    with ExitStack() as stack, pq.ParquetFile(table, pre_buffer=False) as file:
        files = {
            (split, name): stack.enter_context(open(folder / f"{split}-{name}", "xb"))
            for split in SPLITS
            for name in names
        }
        for batch in file.iter_batches(BATCH_ROWS, columns=["split", *sides, *(["desirable"] if feedback else [])]):
            rows = np.stack([tokens.rows_of(batch[side]) for side in sides], axis=1)
            assert (rows >= 0).all()  # prepare writes every response of a pair
            _write_batch(files, batch, rows, tokens, ranks)


def _write_batch(
    files: Mapping[tuple[str, str], BinaryIO],
    batch: pa.RecordBatch,
    rows: npt.NDArray[np.int64],
    tokens: TokenView,
    ranks: npt.NDArray[np.int64],
) -> None:
    prompts = tokens.prompt_numbers[rows]
    responses = tokens.response_starts[rows + 1] - tokens.response_starts[rows]
    values = {
        "rows": rows,
        "groups": ranks[prompts[:, 0]],
        "response_lengths": responses,
        "lengths": (responses + tokens.prompt_starts[prompts + 1] - tokens.prompt_starts[prompts]).sum(axis=1),
    }
    if "desirable" in batch.schema.names:
        values["desirable"] = batch["desirable"].to_numpy(zero_copy_only=False)
    of_split = batch["split"].to_numpy(zero_copy_only=False)
    for (split, name), file in files.items():
        file.write(values[name][of_split == split].astype(FILES[name]).tobytes())
