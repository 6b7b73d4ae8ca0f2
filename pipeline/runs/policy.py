"""Train one policy against the reference cache: what the `train` stage does before and after its ranks.

What a rank does begins in training/rank.py, and its loop is training/loop.py.
"""

from pathlib import Path
from typing import Any

from pipeline.auxdpo.requirements import open_fitting, require_responses
from pipeline.errors import RequestError
from pipeline.params import AnyVariant, AuxDPO, LoopParams, Trainable, TrainParams, variant_loop
from pipeline.reference.drift import check_drift
from pipeline.reference.identity import open_for_model
from pipeline.runs.launch import launch, publish, require_steps
from pipeline.runs.work_folder import file_digest, work_folder
from pipeline.tokens.examples import Examples, open_examples, with_reference_sums
from pipeline.training.job import Job
from pipeline.training.record import EVALUATIONS, last_row
from pipeline.training.trackers import require_trackers


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
    sketches: Path | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Train `variant` with `seed` from the reference's weights, without a reference model; returns train.json's dict.

    With train.evaluate_every, held-out pairs are measured into evaluations.tsv beside `history`. sketches: read for
    AuxDPO alone, which writes its offsets beside the policy. Returns {} where this process is another rank than 0
    (torchrun, srun). Raises RequestError for an unknown variant, an empty split, settings without a step, a tracker
    that is not installed or too much drift, CacheMismatch for a cache of other weights or sketches of something else,
    CacheIncomplete for missing rows: all before any model is loaded.
    """
    settings = variant_loop(params, variant)
    objective = params.variant(variant)
    examples = _examples_of_splits(pairs, settings, feedback=objective.reads_feedback)
    train_pairs = len(examples["train"])
    require_steps(settings, train_pairs, "train")
    require_trackers(settings.log_to)
    cached = open_for_model(reference, model)
    examples = {split: with_reference_sums(of_split, cached) for split, of_split in examples.items()}
    check_drift(cached, dtype=settings.dtype, tolerance=settings.drift_tolerance)
    paths = {"pairs": pairs, "model": model, "reference": reference, "tokenizer": model}
    table = "feedback" if objective.reads_feedback else "pairs"
    inputs = [pairs / f"{table}.parquet", pairs / "responses.parquet", reference / "manifest.json"]
    if isinstance(objective, AuxDPO):
        digests = {"weights": cached.identity.weights, "config": cached.identity.config}
        paths["sketches"] = _fitting_sketches(sketches, examples["train"], objective, trainable=trainable, **digests)
        inputs.append(paths["sketches"] / "manifest.json")
    job = Job(
        kind="preferences",
        title=f"{variant}-{seed}",
        paths={name: str(path) for name, path in paths.items()},
        loop=settings.model_dump(include=set(LoopParams.model_fields)),
        settings=_task_settings(settings, objective, trainable, trust_remote_code),
        seed=seed,
        log_to=tuple(settings.log_to),
        examples={split: list(of_split.places) for split, of_split in examples.items()},
    )
    work = work_folder(job, cached.identity.weights, cached.identity.config, *map(file_digest, inputs))
    summary = launch(job, work, loop=settings, n_examples=train_pairs)
    if summary is None:
        return {}  # rank 0 publishes
    final = last_row(work / "history.tsv")
    final.pop("step")
    summary = {
        "variant": variant,
        "seed": seed,
        "objective": objective.objective,
        "hyperparameters": objective.hyperparameters(),
        "trainable": job.settings["trainable"],
        "pairs": train_pairs,
        **summary,
        "final": final,
    }
    evaluations = history.with_name(EVALUATIONS)
    publish(work, out=out, history=history, evaluations=evaluations, metrics=metrics, summary=summary)
    return summary


def _fitting_sketches(sketches: Path | None, pairs: Examples, objective: AuxDPO, **model: Any) -> Path:
    """The folder, if it holds what AuxDPO needs; raises as open_fitting and require_responses."""
    found = open_fitting(sketches, **model)
    require_responses(found, pairs.key_table, objective)
    return found.path


def _task_settings(
    settings: TrainParams, objective: AnyVariant, trainable: Trainable, trust_remote_code: bool
) -> dict[str, Any]:
    """What training/preference_task.py is told beside the loop's parameters."""
    return {
        "objective": objective.objective,
        "hyperparameters": objective.hyperparameters(),
        "reward_beta": objective.reward_beta,
        "drift_tolerance": settings.drift_tolerance,
        "trainable": trainable if isinstance(trainable, str) else trainable.model_dump(),
        "evaluate_every": settings.evaluate_every,
        "evaluate_pairs": settings.evaluate_pairs,
        # Only where it is set: the settings name the work folder, and runs begun without it go on.
        **({"trust_remote_code": True} if trust_remote_code else {}),
    }


def _examples_of_splits(pairs: Path, settings: TrainParams, *, feedback: bool) -> dict[str, Examples]:
    """Of "train", and of "test" as far as this run measures it."""
    train = open_examples(pairs, "train", feedback=feedback)
    if not len(train):
        raise RequestError(f"{pairs} has no training pairs. Add pairs, or lower prepare.test_share.")
    if not settings.evaluate_every:
        return {"train": train}
    test = open_examples(pairs, "test", feedback=feedback, most=settings.evaluate_pairs)
    if not len(test):
        raise RequestError(
            f"train.evaluate_every is {settings.evaluate_every}, but {pairs} holds no pair out of training. "
            "Raise prepare.test_share, name test pairs in prepare, or set train.evaluate_every: 0."
        )
    return {"train": train, "test": test}
