"""TensorBoard and Weights & Biases, by name and off by default: libraries that are imported only when asked for."""

import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any, Protocol

from pipeline.errors import RequestError
from pipeline.workspace import tracker_folder


class Tracker(Protocol):
    def log(self, group: str, row: Mapping[str, float]) -> None:
        """Take a row with a column `step`; its other columns become curves named GROUP/COLUMN."""

    def close(self) -> None: ...


class TensorBoard:
    """Event files under .refcache/tensorboard/TITLE; look at them with `tensorboard --logdir .refcache/tensorboard`."""

    def __init__(self, title: str, run_id: str, config: Mapping[str, Any], start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Events after a checkpoint belong to a run that died; TensorBoard hides them when told so.
        self._writer = SummaryWriter(str(tracker_folder("tensorboard") / title), purge_step=start + 1)

    def log(self, group: str, row: Mapping[str, float]) -> None:
        for name, value in row.items():
            if name != "step":
                self._writer.add_scalar(f"{group}/{name}", value, int(row["step"]))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """One run per cell, in $WANDB_PROJECT or "refcache"; WANDB_MODE=offline keeps it on this machine."""

    def __init__(self, title: str, run_id: str, config: Mapping[str, Any], start: int) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "refcache"),
            name=title,
            id=run_id,  # a run that was killed goes on under its own id
            resume="allow",
            config=dict(config),
            dir=str(tracker_folder("wandb")),
        )
        # Steps as an axis of their own: wandb's counter refuses to go back to a checkpoint.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, group: str, row: Mapping[str, float]) -> None:
        curves = {f"{group}/{name}": value for name, value in row.items() if name != "step"}
        self._run.log(curves | {"step": int(row["step"])})

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, type[TensorBoard] | type[WeightsAndBiases]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
}


def require_trackers(names: Sequence[str]) -> None:
    """RequestError for a library that is not installed; nothing is imported."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise RequestError(
            f"train.log_to names {', '.join(missing)}, which is not installed here. Nothing was started. "
            f"Run `pip install {' '.join(missing)}`, or take it out of train.log_to; history.tsv is written anyway."
        )


def open_trackers(
    names: Sequence[str], *, title: str, run_id: str, config: Mapping[str, Any], start: int
) -> list[Tracker]:
    """title: what people call the run. run_id: the same for a run and its resumption. start: steps done before."""
    return [TRACKERS[name](title, run_id, config, start) for name in names]
