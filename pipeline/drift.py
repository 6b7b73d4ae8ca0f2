"""Drift: how far the cached log-probs are from the trainer's own forward of the same reference weights."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from cache import Reference
from pipeline.progress import activity, progress_bar
from pipeline.scoring_plan import engine_rows

FILE = "drift.json"
FORMAT_VERSION = 1
_CHUNK_TOKENS = 1024  # response tokens whose vocabulary-wide float32 logits exist at once


def ensure_drift(
    out: Path,
    model: Path,
    *,
    responses: pl.DataFrame,
    pairs: pl.DataFrame,
    reference: Reference,
    trainer_dtype: str,
    sample_size: int,
    trust_remote_code: bool,
) -> dict[str, Any]:
    """Make out/drift.json describe this cache and trainer; returns its content.

    The forward by transformers is repeated only if the sample, the reference or the trainer's dtype changed.
    """
    file = out / FILE
    sample = choose_sample(responses, sample_size)
    keys = sample["response_key"].to_list()
    describes = {
        "format_version": FORMAT_VERSION,
        "reference_id": reference.identity.reference_id,
        "trainer_dtype": trainer_dtype,
        "sample": hashlib.blake2b(b"".join(keys), digest_size=16).hexdigest(),
    }
    before = json.loads(file.read_text()) if file.exists() else {}
    if all(before.get(name) == value for name, value in describes.items()):
        measured = {name: before[name] for name in ("responses", "tokens", "per_token", "per_sequence")}
    else:
        cached = [row.to_numpy() for row in reference.rows(keys)["token_logps"]]
        own = transformers_logps(model, engine_rows(sample), trainer_dtype, trust_remote_code=trust_remote_code)
        measured = drift_statistics(cached, own)
    content = describes | measured | {"typical_margin": _six_digits(typical_margin(pairs, reference))}
    if content != before:
        # A new file and a rename: the old one may be a hard link into DVC's own store.
        temporary = file.with_suffix(".json.partial")
        temporary.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(temporary, file)
    return content


def choose_sample(responses: pl.DataFrame, size: int) -> pl.DataFrame:
    """The `size` responses with the smallest keys, one of them replaced by the longest row if that isn't among them.

    Keys are digests, so this is a random sample that stays the same, and mostly stays when rows are added. The longest
    row is where rounding adds up most.
    """
    length = pl.col("prompt_ids").list.len() + pl.col("response_ids").list.len()
    by_key = responses.sort("response_key")
    longest = by_key.sort(length, descending=True, maintain_order=True).head(1)
    smallest = by_key.head(size)
    if longest["response_key"][0] in smallest["response_key"].to_list():
        return smallest
    return pl.concat([smallest.head(size - 1), longest])


def drift_statistics(cached: Sequence[np.ndarray], own: Sequence[np.ndarray]) -> dict[str, Any]:
    """Absolute differences in nats, per token and per sequence (of the sums), as max, mean and 99th percentile.

    cached, own: one array of token log-probs a response, of equal lengths.
    """
    differences = [a.astype(np.float64) - b.astype(np.float64) for a, b in zip(cached, own, strict=True)]
    per_token = np.abs(np.concatenate(differences))
    per_sequence = np.abs([difference.sum() for difference in differences])
    return {
        "responses": len(differences),
        "tokens": len(per_token),
        "per_token": _spread(per_token),
        "per_sequence": _spread(per_sequence),
    }


def typical_margin(pairs: pl.DataFrame, reference: Reference) -> float:
    """Median over pairs of |sum log p(chosen) - sum log p(rejected)| under the reference, nats; 0 for no pairs.

    What drift is to be compared with: rewards are beta times such differences.
    """
    if pairs.is_empty():
        return 0.0
    chosen, rejected = (reference.sum_logps(pairs[side].to_list()) for side in ("chosen_key", "rejected_key"))
    return float(np.median(np.abs(chosen - rejected)))


def transformers_logps(
    model: Path, rows: Sequence[tuple[np.ndarray, np.ndarray]], dtype: str, *, trust_remote_code: bool = False
) -> list[np.ndarray]:
    """Token log-probs of each response as the trainer computes them: one float32 array (response length,) a row."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from pipeline.logps import ResponseLogps, collate

    logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with activity(f"loading {model} in transformers"):
        loaded = AutoModelForCausalLM.from_pretrained(
            model, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code
        )
        trainer = ResponseLogps(loaded.to(device).eval(), _CHUNK_TOKENS)
    found = []
    tokens = sum(len(prompt) + len(response) for prompt, response in rows)
    with torch.inference_mode(), progress_bar("drift", len(rows), tokens=tokens) as advance:
        for row in rows:
            # One row at a time: padding would cost more than it saves, and the longest row sets the peak memory.
            found.append(trainer(*collate([row]).to(device)).float().cpu().numpy())
            advance(1, len(row[0]) + len(row[1]))
    return found


def _spread(values: np.ndarray) -> dict[str, float]:
    spread = {"max": values.max(), "mean": values.mean(), "p99": np.quantile(values, 0.99)}
    return {name: _six_digits(value) for name, value in spread.items()}


def _six_digits(value: float) -> float:
    """More digits would only say in which order the machine added."""
    return float(f"{value:.6g}")
