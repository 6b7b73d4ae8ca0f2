"""The training loop that sft and train share: batches, accumulation, schedule, history, checkpoints, exact resume."""

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pipeline.batches import batch_indices, micro_batches, steps_for
from pipeline.deepspeed_engine import Engine
from pipeline.errors import RunFailed
from pipeline.history import History
from pipeline.params import LoopParams

Sums = Mapping[str, Tensor]


class Task(Protocol):
    """What is being learnt: sft or preferences."""

    lengths: np.ndarray  # tokens of every example, (n_examples,)
    groups: np.ndarray  # of every example, (n_examples,); those of one group cost less in one micro-batch

    def tokens(self, examples: np.ndarray) -> int:
        """Of one forward over these examples, in the layout at hand."""

    def loss(self, engine: Engine, micro: np.ndarray, batch: np.ndarray) -> tuple[Tensor, Sums]:
        """This micro-batch's share of the batch loss, and named sums over its examples for the history."""

    def summarise(self, sums: dict[str, float], batch: np.ndarray) -> dict[str, float]:
        """The history's columns from sums over the whole batch."""


def learning_rate_at(step: int, *, steps: int, loop: LoopParams) -> float:
    """Linear warm-up, then the schedule down to zero; a pure function of the step, so that resuming needs no state."""
    warmup = math.ceil(loop.warmup_share * steps)
    if step < warmup:
        return loop.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    factor = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
    return loop.learning_rate * factor[loop.schedule]


def ordered_groups(groups: np.ndarray, loop: LoopParams) -> np.ndarray | None:
    """`batch_indices`' groups: the examples' own, or none."""
    return groups if loop.batch_order == "prompts" else None


def micro_steps_for(loop: LoopParams) -> int:
    """Backward passes per optimizer step on each rank; where that varies, any number that isn't 1 (see Engine)."""
    if loop.tokens_per_batch is not None:
        return 2
    return math.ceil(loop.batch_size // loop.ranks / loop.micro_batch_size)


def run_loop(engine: Engine, task: Task, loop: LoopParams, *, seed: int, work: Path) -> int:
    """Train to the end, from the newest checkpoint in `work` if there is one; returns the step it resumed from.

    Writes work/history.tsv (rank 0) and work/checkpoints/. Raises RunFailed on a loss that is not finite.
    """
    steps = steps_for(loop.epochs, len(task.lengths), loop.batch_size)
    checkpoints = work / "checkpoints"
    start = engine.load_newest_checkpoint(checkpoints)
    history = History(work / "history.tsv", keep_steps=start) if engine.rank == 0 else None
    for step in range(start, steps):
        # Reseeded every step, so that dropout, if any, is the same after a resume.
        torch.manual_seed(hash((seed, step, engine.rank)) & 0xFFFFFFFF)
        started = time.perf_counter()
        batch = batch_indices(
            step,
            seed=seed,
            n_examples=len(task.lengths),
            batch_size=loop.batch_size,
            groups=ordered_groups(task.groups, loop),
        )
        learning_rate = learning_rate_at(step, steps=steps, loop=loop)
        engine.set_learning_rate(learning_rate)
        sums = _one_step(engine, task, loop, batch)
        row = {"step": step + 1, "epoch": (step + 1) * loop.batch_size / len(task.lengths)}
        row |= task.summarise(sums, batch)
        row |= {
            "grad_norm": engine.grad_norm(),
            "lr": learning_rate,
            "tokens_per_second": float(task.lengths[batch].sum()) / (time.perf_counter() - started),
        }
        if not math.isfinite(row["loss"]) or not math.isfinite(row["grad_norm"]):
            raise RunFailed(
                f"loss {row['loss']}, gradient norm {row['grad_norm']} at step {step + 1} (examples {batch.tolist()}). "
                f"The last good checkpoint is in {checkpoints}; lower the learning rate and run again."
            )
        if history:
            history.append(row)
        if (step + 1) % loop.checkpoint_every == 0 and step + 1 < steps:
            engine.save_checkpoint(checkpoints, step + 1)
            engine.prune_checkpoints(checkpoints, loop.keep_checkpoints)
    return start


def _one_step(engine: Engine, task: Task, loop: LoopParams, batch: np.ndarray) -> dict[str, float]:
    totals: dict[str, Tensor] = {}
    micros = micro_batches(
        batch,
        task.groups,
        task.tokens,
        rank=engine.rank,
        ranks=engine.ranks,
        micro_batch_size=loop.micro_batch_size,
        tokens_per_batch=loop.tokens_per_batch,
    )
    for number, micro in enumerate(micros, start=1):
        loss, sums = task.loss(engine, micro, batch)
        engine.backward(loss, last=number == len(micros))
        engine.step()
        for name, value in sums.items():
            totals[name] = totals.get(name, 0) + value.detach().double()
    # One collective for all metrics; float64, so that the history doesn't depend on how many ranks added it up.
    values = engine.sum_over_ranks(torch.stack(list(totals.values()))).tolist()
    return dict(zip(totals, values, strict=True))
