"""Drift: how far the cached log-probs are from the trainer's own forward of the same reference weights."""

import hashlib
import json
from collections.abc import Collection, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from cache import CacheLocked, Journal, KeySet, Reference, join_sum_logps
from cache.identity import identity_digest
from cache.key_set import key_array
from pipeline.engine.rows import Row, engine_rows, scored_table
from pipeline.errors import RequestError
from pipeline.files import write_json
from pipeline.params import TrainParams
from pipeline.progress import progress_bar
from pipeline.reference.drift_statistics import drift_statistics, six_digits, worst_first
from pipeline.reference.order import Numbers, chunks
from pipeline.reference.responses import Responses
from pipeline.reference.trainer_forward import TrainerForward
from pipeline.workspace import scratch_folder, trainer_forward_folder

FILE = "drift.json"
FORMAT_VERSION = 2
_MEASURED = ("responses", "tokens", "per_token", "per_sequence", "sequences")


def ensure_drift(
    out: Path,
    model: Path,
    *,
    responses: Responses,
    pairs: Iterable[pa.RecordBatch],
    reference: Reference,
    trainer_dtype: str,
    sample_size: int,
    trust_remote_code: bool,
    tolerance: float | None = None,
    rescored: KeySet | None = None,
) -> dict[str, Any]:
    """Make out/drift.json describe this cache and trainer; returns its content.

    pairs: keys of their sides, as `pair_sides` gives them.
    tolerance: nats a sequence above which a sampled row counts as flagged; None: as recorded before, or
    train.drift_tolerance's default. rescored: keys of the cached rows that hold transformers' float32 values. The
    forward by transformers is repeated only for rows that are new in the sample, or for another trainer's dtype.
    """
    before = read_drift(out) or {}
    sample = choose_sample(responses, sample_size)
    keys = sample["response_key"].to_list()
    describes = {
        "format_version": FORMAT_VERSION,
        "reference_id": reference.identity.reference_id,
        "trainer_dtype": trainer_dtype,
        "sample": keys_digest(keys),
        "values": values_digest(reference, keys),
    }
    if all(before.get(name) == value for name, value in describes.items()):
        measured = {name: before[name] for name in _MEASURED}
    else:
        cached = [row.to_numpy() for row in reference.rows(keys)["token_logps"]]
        own = trainer_logps(model, sample, reference, trainer_dtype, trust_remote_code=trust_remote_code)
        measured = drift_statistics(cached, own) | {"sequences": worst_first(keys, cached, own)}
    if tolerance is None:
        tolerance = before.get("tolerance", TrainParams.model_fields["drift_tolerance"].default)
    content = describes | {name: measured[name] for name in _MEASURED if name != "sequences"}
    content["typical_margin"] = six_digits(typical_margin(pairs, reference))
    rescored = KeySet() if rescored is None else rescored
    content |= {"tolerance": tolerance, "flagged": count_flagged(measured["sequences"], tolerance)}
    content["rescored"] = {"rows": len(rescored), "keys": keys_digest(rescored)}
    content |= {"sequences": measured["sequences"], "rescored_keys": sorted(key.hex() for key in rescored)}
    if content != before:
        write_json(out / FILE, content)
    return content


def read_drift(out: Path) -> dict[str, Any] | None:
    """The content of out/drift.json; None where there is none."""
    file = out / FILE
    return json.loads(file.read_text()) if file.exists() else None


def summary(content: dict[str, Any]) -> dict[str, Any]:
    """drift.json without its rows: what metrics and reports show."""
    return {name: value for name, value in content.items() if name not in ("sequences", "rescored_keys")}


def count_flagged(sequences: Sequence[dict[str, Any]], tolerance: float) -> int:
    """How many of drift.json's `sequences` differ by more than `tolerance` nats."""
    return sum(row["drift"] > tolerance for row in sequences)


def keys_digest(keys: Iterable[bytes]) -> str:
    """Hex digest of a set of response keys, whatever their order."""
    return hashlib.blake2b(b"".join(sorted(keys)), digest_size=16).hexdigest()


def values_digest(reference: Reference, keys: Collection[bytes]) -> str:
    """Hex digest of the cached token log-probs of `keys`, whatever their order: tells whether a drift is still theirs.

    Raises as `Reference.rows`.
    """
    cached = reference.rows(sorted(keys), ["token_logps"])["token_logps"].explode(empty_as_null=False)
    return hashlib.blake2b(cached.to_numpy().astype("<f4").tobytes(), digest_size=16).hexdigest()


def choose_sample(responses: Responses, size: int) -> pl.DataFrame:
    """ROW_COLUMNS of `sample_rows`."""
    return responses.frame(sample_rows(responses, size))


def sample_rows(responses: Responses, size: int) -> Numbers:
    """The numbers of the `size` responses with the smallest keys; the longest row replaces one if it isn't among them.

    Keys are digests, so this is a random sample that stays the same, and mostly stays when rows are added. The longest
    row is where rounding adds up most.
    """
    keys, tokens = responses.table.keys, responses.table.tokens
    smallest, longest = np.empty(0, np.int64), np.empty(0, np.int64)
    for numbers in chunks(len(responses)):
        smallest = np.concatenate([smallest, numbers])
        smallest = smallest[np.argsort(keys[smallest], kind="stable")[:size]]
        longest = np.concatenate([longest, numbers])
        longest = longest[tokens[longest] == tokens[longest].max()]
        longest = longest[np.argsort(keys[longest], kind="stable")[:1]]
    if not np.isin(longest, smallest).all():
        smallest = np.concatenate([smallest[: size - 1], longest])
    return smallest


def typical_margin(pairs: Iterable[pa.RecordBatch], reference: Reference) -> float:
    """Median over pairs of |sum log p(chosen) - sum log p(rejected)| under the reference, nats; 0 for no pairs.

    What drift is to be compared with: rewards are beta times such differences. Memory holds 16 bytes a pair.
    """
    sums = join_sum_logps(reference, pairs, scratch=scratch_folder())
    return float(np.median(np.abs(sums[:, 0] - sums[:, 1]))) if len(sums) else 0.0


def trainer_logps(
    model: Path, sample: pl.DataFrame, reference: Reference, dtype: str, *, trust_remote_code: bool = False
) -> list[np.ndarray]:
    """Token log-probs of each row of `sample` as the trainer computes them; each row is forwarded once and journalled.

    5 % new responses change the sample by as much; forwarding all of it would be most of what such a run costs.
    """
    identity = reference.identity
    versions = {package: version(package) for package in ("torch", "transformers")}
    forward_of = {"weights": identity.weights, "config": identity.config, "dtype": dtype} | versions
    try:
        with Journal(trainer_forward_folder(identity_digest(forward_of))) as journal:
            known = journal.key_set()
            new = sample.filter(~known.contains(key_array(sample["response_key"])))
            if len(new):
                rows = engine_rows(new)
                logps = transformers_logps(model, rows, dtype, trust_remote_code=trust_remote_code)
                journal.append(scored_table(new, rows, logps))
            found: dict[bytes, np.ndarray] = {}
            wanted = KeySet(sample["response_key"])
            for table in journal.tables():
                table = table.filter(wanted.contains(key_array(table["response_key"])))
                values = pl.DataFrame(table.select(["response_key", "token_logps"]))
                found |= zip(values["response_key"], (row.to_numpy() for row in values["token_logps"]), strict=True)
    except CacheLocked:  # by a run that scores the same weights with another engine; waiting would take as long
        return transformers_logps(model, engine_rows(sample), dtype, trust_remote_code=trust_remote_code)
    return [found[key] for key in sample["response_key"]]


def transformers_logps(
    model: Path, rows: Sequence[Row], dtype: str, *, trust_remote_code: bool = False
) -> list[np.ndarray]:
    """Token log-probs of each response as the trainer computes them: one float32 array (response length,) a row."""
    forward = TrainerForward(model, dtype, trust_remote_code=trust_remote_code)
    found = []
    tokens = sum(len(prompt) + len(response) for prompt, response in rows)
    with progress_bar("drift", len(rows), tokens=tokens) as advance:
        for prompt, response in rows:
            found.append(forward(prompt, response))
            advance(1, len(prompt) + len(response))
    return found


def check_drift(reference: Reference, *, dtype: str, tolerance: float) -> None:
    """Refuse a cache whose values differ from the trainer's own by more than `tolerance` nats a sequence (p99)."""
    file = reference.path / FILE
    drift = read_drift(reference.path)
    if drift is None:
        raise RequestError(
            f"{file} is missing: the distance between cache and trainer is unknown. Run `dvc repro score`."
        )
    if drift["trainer_dtype"] != dtype:
        raise RequestError(
            f"{file} was measured against a trainer in {drift['trainer_dtype']}, but this run trains in {dtype}. "
            "The drift in that dtype is unknown; set train.dtype, which score measures in, and run `dvc repro score`."
        )
    sampled = drift.get("sequences", [])
    keys = [bytes.fromhex(row["response_key"]) for row in sampled]
    if sampled and values_digest(reference, keys) != drift["values"]:
        raise RequestError(
            f"{file} was measured on other values than {reference.path} holds now. "
            "The drift of these is unknown; run `dvc repro -f score`, which measures it and scores nothing twice."
        )
    if not drift["per_sequence"]["p99"] <= tolerance:  # NaN is refused too
        flagged = f", {count_flagged(sampled, tolerance)} of {len(sampled)} sampled rows above it" if sampled else ""
        raise RequestError(
            f"{file}: cache and trainer differ by {drift['per_sequence']['p99']:.3g} nats a sequence (p99), "
            f"train.drift_tolerance allows {tolerance:g}{flagged}. Log-ratios would start off zero by that much. "
            f"`refcache verify {reference.path} --drift --repair` scores the rows above it anew with transformers in "
            "float32; or score in float32 (score.dtype) and run `dvc repro score`, or raise the tolerance knowingly."
        )
