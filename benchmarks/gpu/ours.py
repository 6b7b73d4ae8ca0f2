"""Parts `train/plain`, `train/auto` and `auxdpo`: training steps by pipeline/training, without the stage around it.

One engine serves both data sets and all settings, since starting takes longer than steps do; its policy trains on
meanwhile, which changes no cost. Reference values are the policy's own at that moment, so the first loss is log 2.
"""

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.child import (
    Sizes,
    device,
    emit,
    forget_peak,
    free_memory,
    measured,
    now,
    parse,
    peak_bytes,
    require_out_of_memory,
    time_for_another,
)
from benchmarks.gpu.lengths import DATA
from benchmarks.gpu.training import BETA, LEARNING_RATE, ORDERS, pair_tokens
from cache.derived import build_once
from pipeline.auxdpo.nullspace import SketchedGradients
from pipeline.auxdpo.offsets import Offsets
from pipeline.auxdpo.rank_share import RESIDENT_BYTES
from pipeline.forward.head import LOGIT_BYTES
from pipeline.forward.logps import sequence_sums
from pipeline.params import AuxDPO, LoopParams
from pipeline.tokens.examples import SUMS, open_examples
from pipeline.training import preference_task
from pipeline.training.batches import micro_batches
from pipeline.training.deepspeed_engine import leave_distributed
from pipeline.training.job import Job
from pipeline.training.loop import TrainingRun, step_row
from pipeline.training.preference_task import PreferenceTask
from pipeline.workspace import views_folder

TOLERANCE = 5.0  # nats a response, between a forward and the same in other micro-batches, in bf16
KERNELS = {"plain": {"attention": "sdpa", "layer_kernels": "torch"}, "auto": {}}
WARM_UP = 2  # steps of the first setting; of each further one, one


def loop_for(sizes: Sizes, data: str, tokens_per_batch: int, kernels: str) -> LoopParams:
    return LoopParams(
        dtype="bfloat16",
        batch_size=sizes.batch_size,
        tokens_per_batch=tokens_per_batch,
        batch_order=ORDERS[data],
        layout="shared_prompts",
        logps_chunk_tokens=sizes.ours[0][1],
        learning_rate=LEARNING_RATE,
        schedule="constant",
        warmup_share=0.0,
        **KERNELS[kernels],
    )


def job_for(work: Path, data: str, loop: LoopParams) -> Job:
    """Its reference sums are zeros until `set_reference`."""
    examples = open_examples(work / data, "train")
    path = views_folder() / f"sums-made-up-{data}-{len(examples)}"
    build_once(path, lambda partial: np.zeros((len(examples), 2)).tofile(partial / SUMS))
    paths = {"pairs": work / data, "model": work / "model", "tokenizer": work / "model", "reference": path}
    return Job(
        kind="preferences",
        title=f"gpu suite, {data}",
        paths={name: str(path) for name, path in paths.items()},
        loop=loop.model_dump(),
        settings={
            "objective": "dpo",
            "hyperparameters": {"beta": BETA},
            "reward_beta": BETA,
            "drift_tolerance": TOLERANCE,
            "trainable": "all",
            "evaluate_every": 0,
        },
        seed=0,
        examples={"train": list(examples.places._replace(sums=str(path)))},
    )


def set_reference(run: TrainingRun, loop: LoopParams) -> None:
    """By the trainer's own forward. Not under no_grad: kernels would be compiled once more for that."""
    task = run.task
    assert isinstance(task, PreferenceTask)
    sums = np.zeros((len(task.lengths), 2))
    settings: dict[str, Any] = {"rank": 0, "ranks": 1, "micro_batch_size": 1, "tokens_per_batch": loop.tokens_per_batch}
    for micro in micro_batches(np.arange(len(sums)), task.groups, task.tokens, **settings):
        tokens, places = task.pairs.batch(micro)
        tokens = tokens.to(run.engine.device)
        found = sequence_sums(run.engine.engine.module(*tokens).detach(), tokens.rows, int(places.max()) + 1)
        sums[micro] = found.double().cpu().numpy()[places].reshape(2, -1).T
    task.reference_logps = sums


def steps(run: TrainingRun, loop: LoopParams, count: int, work: Path) -> Iterator[tuple[float, dict[str, float]]]:
    """(seconds, row of the history) of the first `count` steps; always the same batches."""
    for step in range(count):
        began = now()
        row = step_row(run, loop, step, steps=count, seed=0, checkpoints=work / "checkpoints")
        yield now() - began, row


def measure(run: TrainingRun, data: str, loop: LoopParams, sizes: Sizes, work: Path, *, warm_up: int) -> dict[str, Any]:
    """Speed and peak of the counted steps, seconds and losses of all."""
    seconds, losses = [], []
    for number, (took, row) in enumerate(steps(run, loop, warm_up + sizes.steps, work)):
        if number + 1 == warm_up:
            forget_peak()
        seconds.append(took)
        losses.append(row["loss"])
    tokens = pair_tokens(run.task, data, loop.batch_size, range(warm_up, len(seconds)))
    return {
        "pair_tokens_per_second": tokens / sum(seconds[warm_up:]),
        "peak_bytes": peak_bytes(),
        "seconds": seconds[warm_up:],
        "warm_up_seconds": seconds[:warm_up],
        "losses": losses,
    }


def throughput(runs: dict[str, tuple[TrainingRun, LoopParams]], sizes: Sizes, work: Path) -> None:
    """Setting by setting, so that both data sets have figures soon."""
    for number, (tokens, chunk) in enumerate(sizes.ours):
        setting = {"tokens_per_batch": tokens, "logps_chunk_tokens": chunk}
        for data, (run, loop) in runs.items():
            if number and not time_for_another():
                return
            run.engine.engine.module.head.chunk_tokens = chunk or default_chunk(sizes)
            if number == 0:
                set_reference(run, loop)
            common = {"data": data, "contender": "refcache", "setting": setting | run.task.kernels}
            try:
                changed = loop.model_copy(update=setting)
                found = measure(run, data, changed, sizes, work, warm_up=1 if number else WARM_UP)
            except RuntimeError as error:
                require_out_of_memory(error)
                emit("training", fits=False, **common)
                return  # the gradients of half a step are left; what comes later is larger
            emit("training", fits=True, **common, **found)
            free_memory()
            measured()


def default_chunk(sizes: Sizes) -> int:
    return max(1, LOGIT_BYTES // (4 * sizes.model["vocab_size"]))


def auxdpo(run: TrainingRun, loop: LoopParams, sizes: Sizes, work: Path) -> None:
    """A step with offsets against one without, on random sketches as wide as those of all blocks."""
    set_reference(run, loop)
    plain = statistics.median(measure(run, DATA[0], loop, sizes, work, warm_up=WARM_UP)["seconds"])
    emit("auxdpo", contender="dpo", step_seconds=plain)
    assert isinstance(run.task, PreferenceTask)
    width = sizes.k * (sizes.model["num_hidden_layers"] + 2)  # blocks, embeddings, final norm
    for responses in sizes.responses:
        offsets = made_up_offsets(run, responses, width)
        run.task.offsets = offsets
        with_offsets = run._replace(companion=offsets)
        try:
            found = measure(with_offsets, DATA[0], loop, sizes, work, warm_up=1)
        except RuntimeError as error:
            require_out_of_memory(error)
            emit("auxdpo", contender="auxdpo", responses=responses, fits=False)
            break
        seconds = statistics.median(found["seconds"])
        resident = responses * width * 4 <= RESIDENT_BYTES
        shape = {"responses": responses, "numbers": width, "sketches_on_device": resident}
        emit("auxdpo", contender="auxdpo", **shape, step_seconds=seconds, of_dpo=seconds / plain)
        del offsets, with_offsets
        run.task.offsets = None
        free_memory()


def made_up_offsets(run: TrainingRun, responses: int, width: int) -> Offsets:
    """Of the run's responses and as many others as are missing, which no pair has."""
    assert isinstance(run.task, PreferenceTask)
    sides = torch.from_numpy(run.task.pairs.examples.rows.astype(np.int64))
    assert int(sides.max()) < responses
    sketches = torch.randn(responses, width, device=device())
    resident = sketches.nbytes <= RESIDENT_BYTES
    gradients = SketchedGradients(
        sketches if resident else sketches.cpu(), torch.randn(responses, 256), torch.ones(responses), device()
    )
    params = AuxDPO(objective="auxdpo", beta=BETA)
    return Offsets(
        np.zeros(responses, "S16"),
        torch.arange(responses) // 2,
        sides,
        gradients,
        slice(0, responses),
        params,
        mean_square=1.0,
        sum_over_ranks=run.engine.sum_over_ranks,
    )


def main() -> None:
    options, sizes = parse(
        __doc__,
        ("--kernels", {"choices": KERNELS, "default": "auto"}),
        ("--auxdpo", {"action": "store_true"}),
    )
    loop = loop_for(sizes, DATA[0], sizes.ours[0][0], options.kernels)
    began = now()
    run = preference_task.start(job_for(options.work, DATA[0], loop), loop)
    emit("start", seconds=now() - began, kernels=run.task.kernels)
    if options.auxdpo:
        auxdpo(run, loop, sizes, options.work)
    else:
        other = loop_for(sizes, DATA[1], sizes.ours[0][0], options.kernels)
        task = preference_task.open_task(job_for(options.work, DATA[1], other), run.task.layout)
        task.kernels = run.task.kernels
        throughput({DATA[0]: (run, loop), DATA[1]: (run._replace(task=task), other)}, sizes, options.work)
    leave_distributed()


if __name__ == "__main__":
    main()
