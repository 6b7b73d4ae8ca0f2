"""Trainings of a tiny policy for tests: by fork from a process that has everything imported (rank_nursery.py)."""

import csv
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
from safetensors.torch import load_file

from pipeline.params import Params, TrainParams
from tests import ROOT

TRAIN = {
    "epochs": 2.0,
    "batch_size": 8,
    "micro_batch_size": 3,
    "learning_rate": 3e-3,
    "checkpoint_every": 3,
    "variants": {
        "dpo": {"objective": "dpo", "beta": 0.5},
        "bdpo": {"objective": "bdpo", "beta": 0.5, "mixture": 0.3},
        "auxdpo": {"objective": "auxdpo", "beta": 0.5, "null_weight": 200.0, "offset_learning_rate": 0.05},
    },
}
Rows = list[dict[str, float]]


def read_table(path: Path) -> Rows:
    with path.open() as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file, delimiter="\t")]


def without_speed(history: Rows) -> Rows:
    return [{name: value for name, value in row.items() if name != "tokens_per_second"} for row in history]


def outputs(out: Path) -> dict[str, Path]:
    """The stage's three outputs under `out`."""
    return {"out": out / "policy", "history": out / "history.tsv", "metrics": out / "train.json"}


def inputs(root: Path) -> dict[str, Path]:
    """What phase 1 left under `root`; sketches, if it has any."""
    found = {"pairs": root / "pairs", "model": root / "model", "reference": root / "logps"}
    return found | ({"sketches": root / "sketches"} if (root / "sketches").exists() else {})


@dataclass
class Finished:
    """What a training left in a folder."""

    out: Path
    said: str = ""

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.out / "train.json").read_text())

    @property
    def history(self) -> Rows:
        return read_table(self.out / "history.tsv")

    @property
    def evaluations(self) -> Rows:
        return read_table(self.out / "evaluations.tsv")

    @property
    def weights(self) -> dict[str, Any]:
        return load_file(next((self.out / "policy").glob("*.safetensors")))

    @property
    def offsets(self) -> pl.DataFrame | None:
        """AuxDPO's table; None without."""
        file = self.out / "policy/offsets.parquet"
        return pl.read_parquet(file) if file.exists() else None

    def equals(self, other: "Finished") -> bool:
        """Bit by bit, but for speeds."""
        ours, theirs = self.weights, other.weights
        return (
            without_speed(self.history) == without_speed(other.history)
            and self.evaluations == other.evaluations
            and (self.offsets is None or self.offsets.equals(other.offsets))
            and ours.keys() == theirs.keys()
            and all((ours[name] == theirs[name]).all() for name in ours)
        )


class RanksEnded(Exception):
    """Ranks that did not end well: exit codes by rank, negative for a signal, and what they printed."""

    def __init__(self, codes: list[int], said: str) -> None:
        super().__init__(f"{codes}\n{said}")
        self.codes, self.said = codes, said


class Nursery:
    """Runs stages on forked ranks, one run at a time; a context manager."""

    def train(
        self,
        root: Path,
        out: Path,
        *,
        home: Path | None = None,
        variant: str = "dpo",
        seed: int = 0,
        trainable: Any = "all",
        moments: tuple[tuple[int, str, int], ...] = (),
        by: str = "torch",
        nan_pair: int | None = None,
        **settings: Any,
    ) -> Finished:
        """One cell, from the inputs under `root`, to its end; RanksEnded unless all ranks ended well.

        home: REFCACHE_HOME, out/work by default. moments: (rank, what, n), see rank_nursery. by: whose variables say
        which rank a process is, "torch" or "slurm". nan_pair: the number of a training pair whose loss is NaN.
        """
        params = TrainParams.model_validate(TRAIN | settings)
        arguments = {
            "paths": {name: str(path) for name, path in (inputs(root) | outputs(out)).items()},
            "params": params.model_dump(),
            "trainable": trainable,
            "variant": variant,
            "seed": seed,
        }
        order = {"stage": "train", "arguments": arguments, "ranks": params.ranks, "moments": moments, "by": by}
        order["nan_pair"] = nan_pair
        return self._run(order, out, home or out / "work")

    def sft(self, out: Path, *, paths: dict[str, Path], params: dict[str, Any], model: dict[str, Any]) -> None:
        words = {name: str(path) for name, path in paths.items()}
        arguments = {"paths": words, "params": params, "model": model}
        ranks = params.get("ranks", 1)
        order = {"stage": "sft", "arguments": arguments, "ranks": ranks, "moments": (), "by": "torch", "nan_pair": None}
        self._run(order, out, out / "work")

    def _run(self, order: dict[str, Any], out: Path, home: Path) -> Finished:
        out.mkdir(parents=True, exist_ok=True)
        output = out / "output"
        output.unlink(missing_ok=True)
        order |= {"environment": {"REFCACHE_HOME": str(home)}, "output": str(output)}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        codes = json.loads(self.answers.readline())
        said = output.read_text(errors="replace")
        if any(codes):
            raise RanksEnded(codes, said)
        return Finished(out, said)

    def __enter__(self) -> "Nursery":
        reading, writing = os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.integration.rank_nursery", str(writing)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            pass_fds=[writing],
        )
        os.close(writing)
        self.answers = os.fdopen(reading)
        return self

    def __exit__(self, *raised: object) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.answers.close()


def params_file(path: Path, **settings: Any) -> Path:
    """A whole params.yaml around TRAIN; JSON is YAML."""
    whole = {"model": {"name": "unused"}, "prepare": {}, "sft": {}, "score": {}, "trainable": "all"}
    whole |= {"train": TRAIN | settings, "sweep": {"variants": ["dpo"], "seeds": [0]}, "evaluate": {}}
    Params.model_validate(whole)
    path.write_text(json.dumps(whole))
    return path


def train_command(root: Path, out: Path, params: Path) -> list[str]:
    """The words after `python`, for a stage that writes to `out`."""
    paths = inputs(root) | outputs(out) | {"params": params}
    options = [word for name, path in paths.items() for word in (f"--{name}", str(path))]
    return ["-m", "stages", "train", "--variant", "dpo", "--seed", "0", *options]


def rank_pids(work: Path) -> dict[int, int]:
    """Ranks that the notes in a work folder name, and their processes."""
    return {int(note.stem): json.loads(note.read_text())["pid"] for note in work.glob("ranks/*.started")}


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
