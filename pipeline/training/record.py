"""What a training run tells while it trains: its tables, and the trackers that were asked for. Rank 0 only."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.training.history import History
from pipeline.training.trackers import Tracker

HISTORY, EVALUATIONS = "history.tsv", "evaluations.tsv"


class RunRecord:
    def __init__(self, work: Path, start: int, *, saved: Path, trackers: Sequence[Tracker] = ()) -> None:
        """saved: the folder of the checkpoint of step `start`, with the tables as they were then."""
        self._history, self._evaluations = (
            History(work / name, keep_steps=start, saved=saved / name) for name in (HISTORY, EVALUATIONS)
        )
        self._trackers = trackers

    def trained(self, row: Mapping[str, float]) -> None:
        self._history.append(row)
        for tracker in self._trackers:
            tracker.log("train", row)

    def evaluated(self, row: Mapping[str, float]) -> None:
        self._evaluations.append(row)
        for tracker in self._trackers:
            tracker.log("held-out", row)

    def files(self) -> list[Path]:
        """What a checkpoint takes along."""
        return [self._history.path, self._evaluations.path]

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.close()
