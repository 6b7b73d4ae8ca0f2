"""What is stored of the responses that are shown: token ids of prepare, log-probs of the reference cache."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from cache import KeySet, Reference
from cache.key_set import key_array
from pipeline.data.tables import ROW_GROUP_ROWS, scan_responses
from pipeline.errors import RequestError


class Stored(NamedTuple):
    """A response; token_logps (tokens,) float32 in nats and their sum, None where the cache has no row."""

    ids: list[int]
    truncated: bool
    logps: npt.NDArray[np.float32] | None
    sum_logp: float | None


class StoredResponses:
    """Looked up by response key; memory holds the ids and log-probs of all that were asked for, 8 bytes a token."""

    def __init__(self, folder: Path, reference: Reference, keys: KeySet) -> None:
        """folder: prepared pairs. Raises RequestError where that lacks one of `keys`, and as cache.Reference.rows."""
        self._keys = keys
        self._ids, self._id_row = _responses(folder, keys)
        self._logps, self._logp_row = _logps(reference, keys)

    @property
    def missing(self) -> int:
        """Responses without a row in the cache."""
        return int((self._logp_row < 0).sum())

    def of(self, key: bytes) -> Stored:
        position = self._keys.positions(key_array([key]))[0]
        ids = self._ids.slice(int(self._id_row[position]), 1)
        row = int(self._logp_row[position])
        logps, total = None, None
        if row >= 0:
            logps = self._logps["token_logps"][row].values.to_numpy(zero_copy_only=False)
            total = self._logps["sum_logp"][row].as_py()
        return Stored(ids["response_ids"][0].as_py(), ids["truncated"][0].as_py(), logps, total)


def _responses(folder: Path, keys: KeySet) -> tuple[pa.Table, npt.NDArray[np.int64]]:
    scan_responses(folder)
    columns = ["response_key", "response_ids", "truncated"]
    parts, row_of, n_found = list[pa.Table](), np.full(len(keys), -1), 0
    with pq.ParquetFile(folder / "responses.parquet", pre_buffer=False) as file:
        for batch in file.iter_batches(ROW_GROUP_ROWS, columns=columns):
            positions = keys.positions(key_array(batch["response_key"]))
            found = positions >= 0
            if found.any():
                row_of[positions[found]] = n_found + np.arange(found.sum())
                n_found += int(found.sum())
                parts.append(pa.Table.from_batches([batch.filter(pa.array(found))]))
    if n_found < len(keys):
        raise RequestError(
            f"{folder}/responses.parquet lacks {len(keys) - n_found} of the {len(keys)} responses that pairs.parquet "
            "names: the two files belong to different runs. Run `dvc repro -f prepare`."
        )
    return pa.concat_tables(parts).combine_chunks(), row_of


def _logps(reference: Reference, keys: KeySet) -> tuple[pa.Table, npt.NDArray[np.int64]]:
    columns = ["token_logps", "sum_logp"]
    parts = [reference.identity.kind.schema.empty_table().select(columns)]
    row_of, n_found = np.full(len(keys), -1), 0
    for positions, rows in reference.matching(keys, columns):
        row_of[positions] = n_found + np.arange(len(positions))
        n_found += len(positions)
        parts.append(rows.select(columns))
    return pa.concat_tables(parts).combine_chunks(), row_of
