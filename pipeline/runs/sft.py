"""Supervised fine-tuning of the reference: what the `sft` stage does. The ranks' side is training/sft_task.py."""

import json
from pathlib import Path
from typing import Any

from pipeline.data.tables import read_sft
from pipeline.errors import RequestError
from pipeline.params import ModelParams, SftParams
from pipeline.runs.launch import Job, file_digest, launch, publish, require_steps, work_folder
from pipeline.training.history import last_row


def fine_tune(
    *, sft: Path, tokenizer: Path, out: Path, history: Path, metrics: Path, params: SftParams, model: ModelParams
) -> dict[str, Any]:
    """Train the reference on prepare's sft rows and write it to `out` as a transformers folder.

    epochs 0 takes model.name as it is. Raises RequestError for a model that can't be loaded or no rows to train on.
    """
    if params.epochs == 0:
        return _take_as_is(tokenizer=tokenizer, out=out, history=history, metrics=metrics, model=model)
    rows = read_sft(sft)
    if rows.is_empty():
        raise RequestError(f"{sft} has no rows to train on. Set prepare.sft.source, or sft.epochs: 0.")
    require_steps(params, len(rows), "sft")
    job = Job(
        kind="sft",
        title="sft",
        paths={"sft": str(sft), "tokenizer": str(tokenizer)},
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
    from pipeline.model.folders import initial_model, load_tokenizer, save_model

    loaded = initial_model(model, load_tokenizer(tokenizer))
    save_model(loaded, loaded.state_dict(), tokenizer, out)
    for path in (history, metrics):
        path.parent.mkdir(parents=True, exist_ok=True)
    history.write_text("step\tepoch\tloss\tgrad_norm\tlr\ttokens_per_second\n")
    summary = {"steps": 0, "tokens": 0, "seconds": 0.0}
    metrics.write_text(json.dumps(summary, indent=1) + "\n")
    return summary
