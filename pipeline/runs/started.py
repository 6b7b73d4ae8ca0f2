"""Was this process started as one rank of several? By torchrun, or by srun with several tasks.

Then it is a rank itself instead of starting some, and only rank 0 takes locks and writes outputs.
"""

import os
import re
from collections.abc import MutableMapping
from typing import NamedTuple

from pipeline.errors import RequestError
from pipeline.runs.ports import LOWEST, PORTS

_TORCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_SLURM = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_JOB_ID", "SLURM_STEP_NODELIST")


class StartedRank(NamedTuple):
    rank: int
    ranks: int
    by: str  # what started it, for messages


def started_rank(environment: MutableMapping[str, str] = os.environ) -> StartedRank | None:
    """The rank that this process is, None if it is none; srun's variables are completed with those torch reads.

    A batch script and `srun -n 1` carry SLURM's variables too, but start one process that is to start its own ranks.
    """
    if all(name in environment for name in _TORCH):
        return StartedRank(int(environment["RANK"]), int(environment["WORLD_SIZE"]), "torchrun")
    if not all(name in environment for name in _SLURM) or int(environment["SLURM_STEP_NUM_TASKS"]) == 1:
        return None
    environment["RANK"], environment["WORLD_SIZE"] = environment["SLURM_PROCID"], environment["SLURM_STEP_NUM_TASKS"]
    environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
    environment.setdefault("MASTER_ADDR", first_node(environment["SLURM_STEP_NODELIST"]))
    # One port per job step, and the same on all its hosts.
    step = int(environment.get("SLURM_STEP_ID", "0"))
    environment.setdefault("MASTER_PORT", str(LOWEST + (int(environment["SLURM_JOB_ID"]) * 7 + step) % PORTS))
    return StartedRank(int(environment["RANK"]), int(environment["WORLD_SIZE"]), "srun")


def first_node(nodes: str) -> str:
    """The first of SLURM's node list: `a1`, `a[01-04,7],b2` -> `a01`."""
    found = re.match(r"([^,\[\]]+)(?:\[([^,\-\]]+)[^\]]*\]([^,\[]*))?", nodes)
    if not found:
        raise RequestError(f"SLURM_STEP_NODELIST is {nodes!r}, which names no node. Set MASTER_ADDR to rank 0's host.")
    prefix, number, suffix = found.groups(default="")
    return prefix + number + suffix


def require_ranks(started: StartedRank, wanted: int) -> None:
    """RequestError unless as many ranks were started as the params say."""
    if started.ranks != wanted:
        raise RequestError(
            f"{started.by} started {started.ranks} processes, but ranks is {wanted} in the params. Batches are divided "
            f"by that number; add `--set train.ranks={started.ranks}` (sft.ranks for sft), or start {wanted}."
        )
