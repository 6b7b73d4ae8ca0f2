"""Train one policy against the reference cache: what the `train` stage does. The ranks' side is preference_task.py."""

import json
from pathlib import Path
from typing import Any

import polars as pl

from cache import Reference, require_keys
from pipeline.drift import FILE, count_flagged, open_for_model, values_digest
from pipeline.errors import RequestError
from pipeline.history import last_row
from pipeline.launch import Job, file_digest, launch, publish, work_folder
from pipeline.params import LoopParams, Trainable, TrainParams, variant_loop
from pipeline.prepared_data import PAIR_SIDES, scan_pairs
from pipeline.workspace import scratch_folder


def train_policy(
    *,
    variant: str,
    seed: int,
    pairs: Path,
    model: Path,
    reference: Path,
    out: Path,
    history: Path,
    metrics: Path,
    params: TrainParams,
    trainable: Trainable,
) -> dict[str, Any]:
    """Train `variant` with `seed` from the reference's weights, without a reference model; returns train.json's dict.

    Raises RequestError for an unknown variant, an empty split or too much drift, CacheMismatch for a cache of other
    weights, CacheIncomplete for missing rows: all before any model is loaded.
    """
    if variant not in params.variants:
        raise RequestError(f"--variant {variant!r} is not in train.variants, which has {sorted(params.variants)}.")
    settings = variant_loop(params, variant)
    train_pairs = scan_pairs(pairs).filter(pl.col("split") == "train").select(PAIR_SIDES).collect()
    if train_pairs.is_empty():
        raise RequestError(f"{pairs} has no training pairs. Add pairs, or lower prepare.test_share.")
    cached = open_for_model(reference, model)
    require_keys(cached, train_pairs.to_arrow().to_batches(), scratch=scratch_folder())
    check_drift(cached, dtype=settings.dtype, tolerance=settings.drift_tolerance)
    objective = params.variants[variant]
    loop = settings.model_dump(include=set(LoopParams.model_fields))
    job = Job(
        kind="preferences",
        paths={"pairs": str(pairs), "model": str(model), "reference": str(reference), "tokenizer": str(model)},
        loop=loop,
        settings={
            "objective": objective.objective,
            "hyperparameters": objective.hyperparameters(),
            "reward_beta": objective.reward_beta,
            "drift_tolerance": settings.drift_tolerance,
            "trainable": trainable if isinstance(trainable, str) else trainable.model_dump(),
        },
        seed=seed,
    )
    inputs = [pairs / "pairs.parquet", pairs / "responses.parquet", reference / "manifest.json"]
    work = work_folder(job, cached.identity.weights, cached.identity.config, *map(file_digest, inputs))
    summary = launch(job, work, loop=settings, n_examples=len(train_pairs), title=f"train {variant}-{seed}")
    final = last_row(work / "history.tsv")
    final.pop("step")
    summary = {
        "variant": variant,
        "seed": seed,
        "objective": objective.objective,
        "hyperparameters": objective.hyperparameters(),
        "trainable": job.settings["trainable"],
        "pairs": len(train_pairs),
        **summary,
        "final": final,
    }
    publish(work, out=out, history=history, metrics=metrics, summary=summary)
    return summary


def check_drift(reference: Reference, *, dtype: str, tolerance: float) -> None:
    """Refuse a cache whose values differ from the trainer's own by more than `tolerance` nats a sequence (p99)."""
    file = reference.path / FILE
    if not file.exists():
        raise RequestError(
            f"{file} is missing: the distance between cache and trainer is unknown. Run `dvc repro score`."
        )
    drift = json.loads(file.read_text())
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
