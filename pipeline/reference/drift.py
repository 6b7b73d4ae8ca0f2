"""Drift: how far the cached log-probs are from the trainer's own forward of the same reference weights."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Collection, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from cache import CacheLocked, Journal, Reference, open_reference
from cache.identity import identity_digest
from pipeline.engine.rows import engine_rows, scored_table
from pipeline.model.digests import reference_identity
from pipeline.params import TrainParams
from pipeline.progress import progress_bar
from pipeline.reference.trainer_forward import TrainerForward
from pipeline.workspace import trainer_forward_folder

FILE = "drift.json"
FORMAT_VERSION = 2
_MEASURED = ("responses", "tokens", "per_token", "per_sequence", "sequences")


def ensure_drift(
    out: Path,
    model: Path,
    *,
    responses: pl.DataFrame | pl.LazyFrame,
    pairs: pl.DataFrame,
    reference: Reference,
    trainer_dtype: str,
    sample_size: int,
    trust_remote_code: bool,
    tolerance: float | None = None,
    rescored: Collection[bytes] = (),
) -> dict[str, Any]:
    """Make out/drift.json describe this cache and trainer; returns its content.

    tolerance: nats a sequence above which a sampled row counts as flagged; None: as recorded before, or
    train.drift_tolerance's default. rescored: keys of the cached rows that hold transformers' float32 values. The
    forward by transformers is repeated only for rows that are new in the sample, or for another trainer's dtype.
    """
    file = out / FILE
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
    content |= {"tolerance": tolerance, "flagged": count_flagged(measured["sequences"], tolerance)}
    content["rescored"] = {"rows": len(rescored), "keys": keys_digest(rescored)}
    content |= {"sequences": measured["sequences"], "rescored_keys": sorted(key.hex() for key in rescored)}
    if content != before:
        # A new file and a rename: the old one may be a hard link into DVC's own store.
        temporary = file.with_suffix(".json.partial")
        temporary.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(temporary, file)
    return content


def open_for_model(path: Path, model: Path) -> Reference:
    """The reference cache at `path`, if it holds the answers of these very weights, of whatever engine and dtype.

    Raises as `open_reference`, CacheMismatch naming the field where weights or config differ.
    """
    found = open_reference(path, expect=None).identity
    ours = reference_identity(model, dtype=found.dtype, quantization=found.quantization)
    return open_reference(path, expect=dataclasses.replace(found, weights=ours.weights, config=ours.config))


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


def keys_digest(keys: Collection[bytes]) -> str:
    """Hex digest of a set of response keys, whatever their order."""
    return hashlib.blake2b(b"".join(sorted(keys)), digest_size=16).hexdigest()


def values_digest(reference: Reference, keys: Collection[bytes]) -> str:
    """Hex digest of the cached token log-probs of `keys`, whatever their order: tells whether a drift is still theirs.

    Raises as `Reference.rows`.
    """
    cached = reference.rows(sorted(keys), ["token_logps"])["token_logps"].explode(empty_as_null=False)
    return hashlib.blake2b(cached.to_numpy().astype("<f4").tobytes(), digest_size=16).hexdigest()


def choose_sample(responses: pl.DataFrame | pl.LazyFrame, size: int) -> pl.DataFrame:
    """The `size` responses with the smallest keys, one of them replaced by the longest row if that isn't among them.

    Keys are digests, so this is a random sample that stays the same, and mostly stays when rows are added. The longest
    row is where rounding adds up most.
    """
    length = (pl.col("prompt_ids").list.len() + pl.col("response_ids").list.len()).alias("length")
    lengths = responses.lazy().select("response_key", length)
    longest = lengths.bottom_k(1, by=["length", "response_key"], reverse=[True, False])
    smallest = lengths.bottom_k(size, by="response_key")
    keys = smallest.collect(engine="streaming")["response_key"].sort()
    extra = longest.collect(engine="streaming")["response_key"]
    if extra[0] not in keys.to_list():
        keys = keys.head(size - 1).append(extra)
    rows = responses.lazy().filter(pl.col("response_key").is_in(keys.implode())).collect(engine="streaming")
    return keys.to_frame().join(rows, on="response_key", how="left", maintain_order="left")


def drift_statistics(cached: Sequence[np.ndarray], own: Sequence[np.ndarray]) -> dict[str, Any]:
    """Absolute differences in nats, per token and per sequence (of the sums), as max, mean and 99th percentile.

    cached, own: one array of token log-probs a response, of equal lengths.
    """
    differences = [difference(a, b) for a, b in zip(cached, own, strict=True)]
    per_token = np.abs(np.concatenate(differences))
    per_sequence = np.abs([one.sum() for one in differences])
    return {
        "responses": len(differences),
        "tokens": len(per_token),
        "per_token": _spread(per_token),
        "per_sequence": _spread(per_sequence),
    }


def worst_first(keys: Sequence[bytes], cached: Sequence[np.ndarray], own: Sequence[np.ndarray]) -> list[dict[str, Any]]:
    """One {"response_key" (hex), "n_tokens", "drift" (nats)} a response, largest drift first, ties by key."""
    rows = [
        {"response_key": key.hex(), "n_tokens": len(a), "drift": six_digits(abs(difference(a, b).sum()))}
        for key, a, b in zip(keys, cached, own, strict=True)
    ]
    return sorted(rows, key=lambda row: (-row["drift"], row["response_key"]))


def difference(cached: np.ndarray, own: np.ndarray) -> np.ndarray:
    """cached - own in float64; ValueError where the lengths differ, which numpy would broadcast for a single token."""
    if cached.shape != own.shape:
        raise ValueError(f"{len(cached)} cached token log-probs, but the trainer's forward gave {len(own)}")
    return cached.astype(np.float64) - own.astype(np.float64)


def typical_margin(pairs: pl.DataFrame, reference: Reference) -> float:
    """Median over pairs of |sum log p(chosen) - sum log p(rejected)| under the reference, nats; 0 for no pairs.

    What drift is to be compared with: rewards are beta times such differences.
    """
    if pairs.is_empty():
        return 0.0
    chosen, rejected = (reference.sum_logps(pairs[side].to_list()) for side in ("chosen_key", "rejected_key"))
    return float(np.median(np.abs(chosen - rejected)))


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
            new = sample.filter(~pl.col("response_key").is_in(list(journal.keys())))
            if len(new):
                rows = engine_rows(new)
                logps = transformers_logps(model, rows, dtype, trust_remote_code=trust_remote_code)
                journal.append(scored_table(new, rows, logps))
            found: dict[bytes, np.ndarray] = {}
            for table in journal.tables():
                values = pl.DataFrame(table.select(["response_key", "token_logps"]))
                found |= zip(values["response_key"], (row.to_numpy() for row in values["token_logps"]), strict=True)
    except CacheLocked:  # by a run that scores the same weights with another engine; waiting would take as long
        return transformers_logps(model, engine_rows(sample), dtype, trust_remote_code=trust_remote_code)
    return [found[key] for key in sample["response_key"]]


def transformers_logps(
    model: Path, rows: Sequence[tuple[np.ndarray, np.ndarray]], dtype: str, *, trust_remote_code: bool = False
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


def _spread(values: np.ndarray) -> dict[str, float]:
    spread = {"max": values.max(), "mean": values.mean(), "p99": np.quantile(values, 0.99)}
    return {name: six_digits(value) for name, value in spread.items()}


def six_digits(value: float) -> float:
    """More digits would only say in which order the machine added."""
    return float(f"{value:.6g}")
