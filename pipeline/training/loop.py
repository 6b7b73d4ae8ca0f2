"""The training loop that sft and train share: batches, accumulation, schedule, history, checkpoints, exact resume."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.errors import RunFailed
from pipeline.params import LoopParams
from pipeline.training.batches import batch_indices, micro_batches, steps_for
from pipeline.training.checkpoints import complete_checkpoints, place, prune
from pipeline.training.deepspeed_engine import Engine
from pipeline.training.record import RunRecord
from pipeline.training.trackers import Tracker

Sums = Mapping[str, Tensor]


class Task(Protocol):
    """What is being learnt: sft or preferences."""

    lengths: np.ndarray  # tokens of every example, (n_examples,)
    groups: np.ndarray  # of every example, (n_examples,); those of one group cost less in one micro-batch
    layout: str  # of a forward (forward/layout.py)
    kernels: dict[str, str]  # which ones the model has, for the metrics

    def tokens(self, examples: np.ndarray) -> int:
        """Tokens of one forward over these examples, in the layout at hand."""

    def loss(self, engine: Engine, micro: np.ndarray, batch: np.ndarray) -> tuple[Tensor, Sums]:
        """This micro-batch's share of the batch loss, and named sums over its examples for the history."""

    def summarise(self, sums: dict[str, float], batch: np.ndarray) -> dict[str, float]:
        """The history's columns from sums over the whole batch."""

    def names(self, examples: np.ndarray) -> list[str]:
        """What people call these examples: ids, source lines."""


class HeldOut(Protocol):
    """Examples that don't train, measured now and then."""

    def due(self, step: int, steps: int) -> bool: ...

    def measure(self, engine: Engine) -> dict[str, float]:
        """Means over the examples, the same on every rank. Collective."""


class Companion(Protocol):
    """What trains beside the model with an optimiser of its own, the same on every rank."""

    def step(self, batch: np.ndarray, factor: float) -> dict[str, float]:
        """One update after the model's; factor: of its learning rate. Returns columns of the history. Collective."""

    def save(self, folder: Path) -> Path:
        """Write its state to a file there, for a checkpoint."""

    def load(self, folder: Path) -> None:
        """Go on from that file in a checkpoint."""

    def summary(self) -> dict[str, float]:
        """Figures for people, at the end. Collective."""

    def export(self, folder: Path) -> None:
        """Write what people may want of it beside the finished model."""


class TrainingRun(NamedTuple):
    """What a task's `start` hands to the loop; model: what the engine trains, as it is to be saved."""

    engine: Engine
    task: Task
    model: nn.Module
    held_out: HeldOut | None = None
    companion: Companion | None = None


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


def run_loop(
    run: TrainingRun,
    loop: LoopParams,
    *,
    seed: int,
    work: Path,
    trackers: Callable[[int], Sequence[Tracker]] = lambda start: (),
) -> int:
    """Train to the end, from the newest checkpoint in `work` if there is one; returns the step it resumed from.

    Rank 0 writes work/history.tsv, work/evaluations.tsv if something is held out, work/checkpoints/, and to the
    trackers, which it opens with the step it starts from. Raises RunFailed on a loss, gradient or weight that is not
    finite.
    """
    engine, task, _, held_out, companion = run
    steps = steps_for(loop.epochs, len(task.lengths), loop.batch_size)
    checkpoints = work / "checkpoints"
    start = engine.load_newest_checkpoint(checkpoints)
    if companion and start:
        companion.load(place(checkpoints, start))
    record = (
        RunRecord(work, start, saved=place(checkpoints, start), trackers=trackers(start)) if not engine.rank else None
    )
    for step in range(start, steps):
        row = step_row(run, loop, step, steps=steps, seed=seed, checkpoints=checkpoints)
        if record:
            record.trained(row)
        if held_out and held_out.due(step + 1, steps):
            measured = held_out.measure(engine)
            if record:
                record.evaluated({"step": step + 1} | measured)
        if (step + 1) % loop.checkpoint_every == 0 or step + 1 == steps:  # the last: saving may fail, and be repeated
            _require_finite_weights(engine, step + 1, checkpoints)
            beside = [*record.files(), *([companion.save(work)] if companion else [])] if record else ()
            engine.save_checkpoint(checkpoints, step + 1, beside=beside)
            if record:
                prune(checkpoints, loop.keep_checkpoints)
    if record:
        record.close()
    return start


def step_row(
    run: TrainingRun, loop: LoopParams, step: int, *, steps: int, seed: int, checkpoints: Path
) -> dict[str, float]:
    """Make optimizer step `step` (0-based); its row of the history."""
    engine, task, companion = run.engine, run.task, run.companion
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
    sums, losses = _one_step(engine, task, loop, batch)
    row = {"step": step + 1, "epoch": (step + 1) * loop.batch_size / len(task.lengths)}
    row |= task.summarise(sums, batch)
    row |= {"grad_norm": engine.grad_norm(), "lr": learning_rate}
    _require_finite(engine, task, row, losses, batch, checkpoints)
    if companion:
        row |= companion.step(batch, learning_rate / loop.learning_rate)
    return row | {"tokens_per_second": float(task.lengths[batch].sum()) / (time.perf_counter() - started)}


def _require_finite(
    engine: Engine,
    task: Task,
    row: Mapping[str, float],
    losses: Sequence[tuple[np.ndarray, Tensor]],
    batch: np.ndarray,
    checkpoints: Path,
) -> None:
    """RunFailed naming the examples at fault, unless the step's loss and gradient are finite. losses: of this rank."""
    if math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]):
        return
    suspects = np.concatenate(engine.gather(_not_finite(losses)))
    raise RunFailed(
        f"loss {row['loss']}, gradient norm {row['grad_norm']} at step {row['step']}, training on "
        f"{_listed(task.names(suspects if len(suspects) else batch))}. "
        f"{_newest(checkpoints)} Look at these examples, or lower the learning rate and run again."
    )


def _one_step(
    engine: Engine, task: Task, loop: LoopParams, batch: np.ndarray
) -> tuple[dict[str, float], list[tuple[np.ndarray, Tensor]]]:
    """Sums over the batch; and this rank's micro-batches, each with its share of the loss."""
    totals: dict[str, Tensor] = {}
    losses = []
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
        losses.append((micro, loss.detach()))
        engine.backward(loss, last=number == len(micros))
        engine.step()
        for name, value in sums.items():
            totals[name] = totals.get(name, 0) + value.detach().double()
    # One collective for all metrics; float64, so that the history doesn't depend on how many ranks added it up.
    values = engine.sum_over_ranks(torch.stack(list(totals.values()))).tolist()
    return dict(zip(totals, values, strict=True)), losses


def _not_finite(losses: Sequence[tuple[np.ndarray, Tensor]]) -> np.ndarray:
    """The examples of the micro-batches whose loss is NaN or inf."""
    return np.concatenate([micro[:0] if math.isfinite(float(loss)) else micro for micro, loss in losses])


def _require_finite_weights(engine: Engine, step: int, checkpoints: Path) -> None:
    """An update can overflow although loss and gradient were finite; resuming from it would be of no use."""
    if not engine.weights_are_finite():
        raise RunFailed(
            f"weights became NaN or inf in the update of step {step}; they are not saved. {_newest(checkpoints)} "
            "Lower the learning rate and run again."
        )


def _newest(checkpoints: Path) -> str:
    complete = complete_checkpoints(checkpoints)
    if not complete:
        return "There is no checkpoint yet."
    return f"The last good checkpoint is {place(checkpoints, complete[-1])}."


def _listed(names: list[str], most: int = 8) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
