"""One rank of a training run, from start to saved model; whoever started it is none of its business."""

import resource
import time
from pathlib import Path
from typing import Any

from pipeline.files import write_json
from pipeline.model.trainable import count_trained
from pipeline.params import LoopParams
from pipeline.training import preference_task, sft_task
from pipeline.training.batches import steps_for, tokens_in
from pipeline.training.deepspeed_engine import init_distributed, leave_distributed
from pipeline.training.job import SUMMARY, Job
from pipeline.training.loop import ordered_groups, run_loop
from pipeline.training.record import HISTORY, median
from pipeline.training.saving import save_trained, try_saving
from pipeline.training.trackers import open_trackers


def run_rank(job: Job, work: Path) -> dict[str, Any] | None:
    """Train as the rank that the environment says, and save the model; returns rank 0's summary."""
    init_distributed()
    loop = LoopParams.model_validate(job.loop)
    began = time.perf_counter()
    run = {"sft": sft_task, "preferences": preference_task}[job.kind].start(job, loop)
    try_saving(run.model, run.engine, job, work)
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
    save_trained(run.model, run.engine, job, work / "model")
    summary = None
    if run.engine.rank == 0:
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
            "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10,  # of rank 0, in host memory
            **beside,
        }
        write_json(work / SUMMARY, summary)
    leave_distributed()
    return summary
