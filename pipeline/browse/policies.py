"""Policies' log-probs of responses, as `evaluate` keeps them in .refcache/answers; nothing is asked of a model here."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cache import Journal, KeySet, ReferenceIdentity
from cache.key_set import key_array, key_bytes
from pipeline.errors import RequestError
from pipeline.policies.identity import open_policy
from pipeline.progress import activity
from pipeline.workspace import answers_folder


class Read(NamedTuple):
    """Log-probs in nats: the sum, and of each token, (tokens,) float32."""

    total: float
    logps: npt.NDArray[np.float32]


PolicyLogps = Mapping[str, Mapping[bytes, Read]]  # policy -> response_key -> log-probs


def read_policies(folders: Sequence[Path], reference: ReferenceIdentity, keys: KeySet) -> PolicyLogps:
    """What is kept of `keys` for each policy, by the name of its folder.

    folders: of trained policies, whose weights are read once to know them. Raises RequestError for one that is no
    policy, or that was never evaluated against this reference, and CacheLocked while an evaluation runs.
    """
    found = dict[str, dict[bytes, Read]]()
    for folder in folders:
        if folder.name in found:
            raise RequestError(
                f"Two folders of --policy are named {folder.name}; rename one, since names stand on the page."
            )
        with activity(f"digesting {folder}"):
            identity = open_policy(folder.name, folder, reference).identity
        kept = answers_folder() / identity.reference_id / "logps"
        if not (kept / "rows.journal").is_file():
            raise RequestError(
                f"{folder} has no log-probs in {kept}: it was not evaluated against this reference, or its answers "
                "were dropped. Run `dvc repro -f evaluate`, or leave that --policy out."
            )
        with Journal(kept) as journal:
            found[folder.name] = {key: read for table in journal.tables() for key, read in _wanted(table, keys)}
    return found


def _wanted(table: pa.Table, keys: KeySet) -> list[tuple[bytes, Read]]:
    asked = key_array(table["response_key"])
    rows = table.filter(pa.array(keys.contains(asked)))
    logps = (np.array(values, np.float32) for values in rows["token_logps"].to_pylist())
    names = key_bytes(key_array(rows["response_key"]))
    return [(key, Read(*read)) for key, *read in zip(names, rows["sum_logp"].to_pylist(), logps, strict=True)]
