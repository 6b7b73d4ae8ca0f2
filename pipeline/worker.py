"""One training rank: `python -m pipeline.worker JOB`, started by DeepSpeed's launcher (see pipeline/launch.py)."""

import importlib
import json
import os
import resource
import sys
import threading
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

from pipeline.errors import RequestError, RunFailed
from pipeline.launch import Job

TASKS = {"sft": "pipeline.sft_task", "preferences": "pipeline.preference_task"}


def main() -> None:
    # The launcher adds --local_rank=N; DeepSpeed reads the rank from the environment.
    job_file = Path(next(argument for argument in sys.argv[1:] if not argument.startswith("--")))
    raw = json.loads(job_file.read_text())
    job = Job(**{field.name: raw[field.name] for field in fields(Job)})
    work = job_file.parent
    _follow_stage_to_the_grave(raw["stage_pid"])
    try:
        _run(job, work)
    except (RequestError, RunFailed) as error:
        kind = "RequestError" if isinstance(error, RequestError) else "RunFailed"
        (work / "error.json").write_text(json.dumps({"kind": kind, "message": str(error)}))
        raise


def _run(job: Job, work: Path) -> None:
    from pipeline.batches import steps_for, tokens_in
    from pipeline.deepspeed_engine import init_distributed
    from pipeline.history import median
    from pipeline.models import save_model
    from pipeline.params import LoopParams
    from pipeline.training import ordered_groups, run_loop

    init_distributed()
    loop = LoopParams.model_validate(job.loop)
    start = importlib.import_module(TASKS[job.kind]).start
    started = time.perf_counter()
    engine, task, model = start(job, loop)
    resumed_from = run_loop(engine, task, loop, seed=job.seed, work=work)
    is_adapter = hasattr(model, "peft_config")
    state = engine.gathered_state(model, trained_only=is_adapter)
    if engine.rank == 0:
        save_model(model, state, Path(job.paths["tokenizer"]), work / "model")
        steps = steps_for(loop.epochs, len(task.lengths), loop.batch_size)
        summary: dict[str, Any] = {
            "steps": steps,
            "tokens": tokens_in(
                steps,
                task.lengths,
                seed=job.seed,
                batch_size=loop.batch_size,
                groups=ordered_groups(task.groups, loop),
            ),
            "tokens_per_second": median(work / "history.tsv", "tokens_per_second"),
            "seconds": time.perf_counter() - started,
            "resumed_from_step": resumed_from,
            "layout": task.layout,
            "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10,  # of rank 0, in host memory
        }
        (work / "summary.json").write_text(json.dumps(summary))


def _follow_stage_to_the_grave(stage_pid: int) -> None:
    """End this rank when the stage is gone: DVC leaves orphans, and an orphan would train on beside its successor."""

    def watch() -> None:
        while True:
            try:
                os.kill(stage_pid, 0)
            except ProcessLookupError:
                os._exit(1)
            time.sleep(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    main()
