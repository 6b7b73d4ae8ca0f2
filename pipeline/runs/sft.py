"""Supervised fine-tuning of the reference: what the `sft` stage does; a rank's side begins in training/rank.py."""

from functools import partial
from pathlib import Path
from typing import Any

from pipeline.errors import RequestError
from pipeline.files import write_json, write_text
from pipeline.params import ModelParams, SftParams
from pipeline.runs.launch import launch, publish, require_steps
from pipeline.runs.work_folder import file_digest, work_folder
from pipeline.tokens.supervised import open_supervised
from pipeline.training.job import Job
from pipeline.training.record import last_row


def fine_tune(
    *, sft: Path, tokenizer: Path, out: Path, history: Path, metrics: Path, params: SftParams, model: ModelParams
) -> dict[str, Any]:
    """Train the reference on prepare's sft rows and write it to `out` as a transformers folder.

    epochs 0 takes model.name as it is. Raises RequestError for a model that can't be loaded or no rows to train on.
    """
    if params.epochs == 0:
        return _take_as_is(tokenizer=tokenizer, out=out, history=history, metrics=metrics, model=model)
    rows = open_supervised(sft)
    if not len(rows):
        raise RequestError(f"{sft} has no rows to train on. Set prepare.sft.source, or sft.epochs: 0.")
    require_steps(params, len(rows), "sft")
    job = Job(
        kind="sft",
        title="sft",
        paths={"sft": str(sft), "tokens": str(rows.path), "tokenizer": str(tokenizer)},
        loop=params.model_dump(exclude={"seed"}),
        settings={"model": model.model_dump()},
        seed=params.seed,
    )
    tokenizer_files = sorted(file for file in tokenizer.iterdir() if file.is_file())
    work = work_folder(job, file_digest(sft), *map(file_digest, tokenizer_files))
    summary = launch(job, work, loop=params, n_examples=len(rows))
    if summary is None:
        return {}  # rank 0 publishes
    summary["loss"] = last_row(work / "history.tsv")["loss"]
    publish(work, out=out, history=history, metrics=metrics, summary=summary)
    return summary


def _take_as_is(*, tokenizer: Path, out: Path, history: Path, metrics: Path, model: ModelParams) -> dict[str, Any]:
    from pipeline.model.proof import answers, require_written
    from pipeline.model.tokenizer import open_prepared_tokenizer
    from pipeline.trainable.initial import initial_model
    from pipeline.trainable.saving import save_model

    loaded = initial_model(model, open_prepared_tokenizer(tokenizer, trust_remote_code=model.trust_remote_code))
    expected = answers(loaded.eval())
    prove = partial(require_written, expected=expected, trust_remote_code=model.trust_remote_code)
    save_model(loaded, loaded.state_dict(), tokenizer, out, prove=prove)
    write_text(history, "step\tepoch\tloss\tgrad_norm\tlr\ttokens_per_second\n")
    summary = {"steps": 0, "tokens": 0, "seconds": 0.0}
    write_json(metrics, summary)
    return summary
