"""Rows that a program asks for and a reference cache lacks, as a folder that `refcache score` reads."""

import hashlib
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cache import response_key
from refcache.lookup import Decode
from refcache.prepared import Response, write_prepared


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
    responses = {}
    for row in rows:
        ids = row.prompt_ids.tolist(), row.response_ids.tolist()
        responses[row.key] = Response(*ids, *(decode(side) if decode else "" for side in ids))
    write_prepared(folder, responses)


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
