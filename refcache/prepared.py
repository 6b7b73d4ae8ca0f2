"""The tables that `prepare` writes (pipeline/data/tables.py), of responses and pairs that a program holds."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from cache import prompt_key
from cache.keys import TokenIds
from pipeline.data.tables import PAIRS_SCHEMA, RESPONSES_SCHEMA, write_table


class Response(NamedTuple):
    prompt_ids: TokenIds
    response_ids: TokenIds
    prompt_text: str
    response_text: str


def write_prepared(folder: Path, responses: Mapping[bytes, Response], pairs: Sequence[dict[str, Any]] = ()) -> None:
    """What `refcache score` reads, all on the training side. responses: by their keys; pairs: rows of PAIRS_SCHEMA."""
    rows = [
        response._asdict()
        | {
            "response_key": key,
            "prompt_key": prompt_key(response.prompt_ids),
            "split": "train",
            "truncated": False,
            "reward": None,
        }
        for key, response in sorted(responses.items())
    ]
    write_table(pa.Table.from_pylist(rows, RESPONSES_SCHEMA), folder / "responses.parquet", RESPONSES_SCHEMA)
    write_table(pa.Table.from_pylist(list(pairs), PAIRS_SCHEMA), folder / "pairs.parquet", PAIRS_SCHEMA)
