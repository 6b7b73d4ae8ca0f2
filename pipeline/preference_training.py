"""Train one policy against the reference cache: what the `train` stage does. The ranks' side is preference_task.py."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from cache import Reference, open_reference, require_keys
from pipeline.errors import RequestError
from pipeline.history import last_row
from pipeline.launch import Job, file_digest, launch, publish, work_folder
from pipeline.params import LoopParams, Trainable, TrainParams, variant_loop
from pipeline.prepared_data import PAIR_SIDES, read_pairs
from pipeline.weights import reference_identity
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
    train_pairs = read_pairs(pairs, "train", columns=PAIR_SIDES)
    if train_pairs.is_empty():
        raise RequestError(f"{pairs} has no training pairs. Add pairs, or lower prepare.test_share.")
    cached = _reference_of(model, reference)
    require_keys(cached, train_pairs.to_arrow().to_batches(), scratch=scratch_folder())
    check_drift(reference, dtype=settings.dtype, tolerance=settings.drift_tolerance)
    objective = params.variants[variant]
    loop = settings.model_dump(include=set(LoopParams.model_fields))
    job = Job(
        kind="preferences",
        paths={"pairs": str(pairs), "model": str(model), "reference": str(reference), "tokenizer": str(model)},
        loop=loop,
        settings={
            "objective": objective.objective,
            "hyperparameters": objective.hyperparameters(),
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


def check_drift(reference: Path, *, dtype: str, tolerance: float) -> None:
    """Refuse a cache whose values differ from the trainer's own by more than `tolerance` nats a sequence (p99)."""
    file = reference / "drift.json"
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
    if drift["per_sequence"]["p99"] > tolerance:
        raise RequestError(
            f"{file}: cache and trainer differ by {drift['per_sequence']['p99']:.3g} nats a sequence (p99), "
            f"train.drift_tolerance allows {tolerance:g}. Log-ratios would start off zero by that much. "
            "Score in float32 (score.dtype) and run `dvc repro score`, or raise the tolerance knowingly."
        )


def _reference_of(model: Path, reference: Path) -> Reference:
    """The cache, if it holds the answers of these very weights; of any engine and dtype, as drift covers both."""
    found = open_reference(reference, expect=None).identity
    weights = reference_identity(model, dtype=found.dtype, quantization=found.quantization)
    return open_reference(reference, expect=dataclasses.replace(found, weights=weights.weights, config=weights.config))
