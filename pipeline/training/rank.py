"""One rank of a training run, from start to saved model; whoever started it is none of its business."""

import time
from pathlib import Path
from typing import Any

from pipeline.files import write_json
from pipeline.model.parts import causal_model
from pipeline.params import LoopParams
from pipeline.trainable.saving import Trained, save_trained, try_saving
from pipeline.trainable.selection import count_trained
from pipeline.training import preference_task, sft_task
from pipeline.training.batches import steps_for, tokens_in
from pipeline.training.deepspeed_engine import init_distributed, leave_distributed
from pipeline.training.job import SUMMARY, Job
from pipeline.training.loop import TrainingRun, ordered_groups, run_loop
from pipeline.training.record import HISTORY, median, peak_bytes
from pipeline.training.trackers import open_trackers


def run_rank(job: Job, work: Path) -> dict[str, Any] | None:
    """Train as the rank that the environment says, and save the model; returns rank 0's summary."""
    init_distributed()
    loop = LoopParams.model_validate(job.loop)
    began = time.perf_counter()
    run = {"sft": sft_task, "preferences": preference_task}[job.kind].start(job, loop)
    if (untrained := _gathered(run, job)) is not None:
        try_saving(untrained, work / "untrained")
    resumed_from = run_loop(
        run,
        loop,
        seed=job.seed,
        work=work,
        trackers=lambda start: open_trackers(
            job.log_to, title=job.title, run_id=work.name, config=job.loop | job.settings, start=start
        ),
    )
    beside = {"offsets": run.companion.summary()} if run.companion else {}
    trained = _gathered(run, job)
    summary = None
    if trained is not None:
        save_trained(trained, work / "model")
        if run.companion:
            run.companion.export(work / "model")
        steps = steps_for(loop.epochs, len(run.task.lengths), loop.batch_size)
        summary = {
            "steps": steps,
            "tokens": tokens_in(
                steps,
                run.task.lengths,
                seed=job.seed,
                batch_size=loop.batch_size,
                groups=ordered_groups(run.task.groups, loop),
            ),
            "tokens_per_second": median(work / HISTORY, "tokens_per_second"),
            "seconds": time.perf_counter() - began,
            "resumed_from_step": resumed_from,
            "layout": run.task.layout,
            **run.task.kernels,
            **count_trained(run.model),
            "peak_bytes": peak_bytes(),  # of rank 0, in host memory
            **beside,
        }
        write_json(work / SUMMARY, summary)
    leave_distributed()
    return summary


def _gathered(run: TrainingRun, job: Job) -> Trained | None:
    """What rank 0 saves; None on the others. Collective."""
    is_adapter = causal_model(run.model) is not run.model
    state = run.engine.gathered_state(run.model, trained_only=is_adapter)
    if run.engine.rank:
        return None
    code = job.settings.get("trust_remote_code", job.settings.get("model", {}).get("trust_remote_code", False))
    base = Path(job.paths["model"]) if is_adapter else None
    return Trained(run.model, state, Path(job.paths["tokenizer"]), base, code)
