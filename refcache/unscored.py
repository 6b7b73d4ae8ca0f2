"""Rows that a program asks for and a reference cache lacks, as a folder that `refcache score` reads."""

import hashlib
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cache import prompt_key, response_key
from pipeline.data.tables import PAIRS_SCHEMA, RESPONSES_SCHEMA, write_table
from refcache.lookup import Decode


class Unscored(NamedTuple):
    """A response under its prompt. number: its row in the dataset; what: it is there; why: it is missing."""

    prompt_ids: npt.NDArray[np.int64]
    response_ids: npt.NDArray[np.int64]
    dataset: str
    number: int
    what: str
    why: str

    @property
    def key(self) -> bytes:
        return response_key(self.prompt_ids, self.response_ids)


def unscored_folder(parent: Path, rows: Sequence[Unscored]) -> Path:
    """PARENT/unscored-DIGEST, by the rows themselves: other rows never take the place of rows that were scored."""
    digest = hashlib.blake2b(b"".join(sorted({row.key for row in rows})), digest_size=4).hexdigest()
    return parent / f"unscored-{digest}"


def write_unscored(folder: Path, rows: Sequence[Unscored], decode: Decode | None) -> None:
    """Write the distinct rows as prepared responses (docs/data.md) without pairs. decode: None leaves texts empty."""
    distinct = {row.key: row for row in rows}
    ordered = [distinct[key] for key in sorted(distinct)]
    prompts = [row.prompt_ids.tolist() for row in ordered]
    responses = [row.response_ids.tolist() for row in ordered]
    texts = [[decode(ids) if decode else "" for ids in side] for side in (prompts, responses)]
    columns = {
        "response_key": [row.key for row in ordered],
        "prompt_key": [prompt_key(row.prompt_ids) for row in ordered],
        "split": ["train"] * len(ordered),
        "prompt_ids": prompts,
        "response_ids": responses,
        "truncated": [False] * len(ordered),
        "prompt_text": texts[0],
        "response_text": texts[1],
        "reward": [None] * len(ordered),
    }
    write_table(pa.table(columns, RESPONSES_SCHEMA), folder / "responses.parquet", RESPONSES_SCHEMA)
    write_table(PAIRS_SCHEMA.empty_table(), folder / "pairs.parquet", PAIRS_SCHEMA)


def scoring_advice(folder: Path) -> str:
    """What scores the rows of such a folder, and how the cache that this publishes is used."""
    paths = {"--pairs": folder, "--model": "REFERENCE", "--out": folder / "logps", "--metrics": folder / "score.json"}
    options = " ".join(f"{option} {shlex.quote(str(path))}" for option, path in paths.items())
    return (
        "\nIf they are what is meant, score them (REFERENCE: the folder of the same reference model), and name both "
        "caches:"
        f"\n  refcache score {options}"
        f"\n  reference_cache=[..., {str(folder / 'logps')!r}]"
    )
