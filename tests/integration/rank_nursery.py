"""Training ranks by fork, killed at chosen moments: `python -m tests.integration.rank_nursery PIPE`.

A rank's imports take seven seconds and more; this process has them loaded and forks the ranks of a run for every line
of JSON on its standard input: `{"stage", "arguments", "ranks", "by", "environment", "output", "moments", "nan_pair"}`.
The forks are stages that find themselves started as ranks, as under torchrun; all they do is real. A moment is
[rank, what, n], at which that rank gets SIGKILL in earnest; the other ranks are then stopped, as torchrun does. The
answer on PIPE is one line, the ranks' exit codes.
"""

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft  # noqa: F401
import torch  # noqa: F401
from pydantic import TypeAdapter
from transformers import Qwen2ForCausalLM  # noqa: F401

from pipeline.params import ModelParams, SftParams, Trainable, TrainParams
from pipeline.runs.policy import train_policy
from pipeline.runs.ports import free_port
from pipeline.runs.sft import fine_tune
from pipeline.training import deepspeed_engine
from pipeline.training import rank as rank_module
from pipeline.training.deepspeed_engine import Engine
from pipeline.training.preference_task import PreferenceTask
from pipeline.training.record import History
from stages.__main__ import exit_code

UNEXPECTED = 3  # exit code of a rank that failed in no foreseen way

# name -> what is wrapped, and whether the kill comes after it
MOMENTS: dict[str, tuple[Any, str, bool]] = {
    "loss": (PreferenceTask, "loss", False),
    "update": (Engine, "step", False),
    "row": (History, "append", True),
    "save": (Engine, "save_checkpoint", False),
    "seal": (deepspeed_engine, "seal", False),
    "sealed": (deepspeed_engine, "seal", True),
    "model": (rank_module, "save_trained", False),
    "saved model": (rank_module, "save_trained", True),
}


def arrange_death(what: str, n: int) -> None:
    owner, name, after = MOMENTS[what]
    original: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def wrapped(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == n and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*arguments, **options)
        if calls == n:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, wrapped)


def spoil(pair: int) -> None:
    """Make the loss of one training pair NaN."""
    original = PreferenceTask.loss

    def loss(task: PreferenceTask, engine: Engine, micro: Any, batch: Any) -> Any:
        value, sums = original(task, engine, micro, batch)
        if pair in micro:
            value, sums["loss"] = value * float("nan"), sums["loss"] * float("nan")
        return value, sums

    PreferenceTask.loss = loss


def run_stage(stage: str, arguments: dict[str, Any]) -> None:
    paths = {name: Path(value) for name, value in arguments["paths"].items()}
    if stage == "sft":
        model = ModelParams.model_validate(arguments["model"])
        fine_tune(**paths, params=SftParams.model_validate(arguments["params"]), model=model)
    else:
        trainable = TypeAdapter(Trainable).validate_python(arguments["trainable"])
        cell = {"variant": arguments["variant"], "seed": arguments["seed"]}
        train_policy(**cell, **paths, params=TrainParams.model_validate(arguments["params"]), trainable=trainable)


def become_rank(order: dict[str, Any], rank: int, port: int) -> None:
    """In the fork; never returns."""
    code = UNEXPECTED
    try:
        output = os.open(order["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        torch_names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": order["ranks"], "LOCAL_SIZE": order["ranks"]}
        torch_names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        slurm_names = {
            "SLURM_PROCID": rank,
            "SLURM_LOCALID": rank,
            "SLURM_STEP_NUM_TASKS": order["ranks"],
            "SLURM_JOB_ID": port,
            "SLURM_STEP_NODELIST": "127.0.0.1",
        }
        names = slurm_names if order["by"] == "slurm" else torch_names
        os.environ |= {name: str(value) for name, value in names.items()} | order["environment"]
        for whose, what, n in order["moments"]:
            if whose == rank:
                arrange_death(what, n)
        if order["nan_pair"] is not None:
            spoil(order["nan_pair"])
        run_stage(order["stage"], order["arguments"])
        code = 0
    except (ValueError, RuntimeError) as error:
        foreseen = exit_code(error)
        code = UNEXPECTED if foreseen is None else foreseen
        if foreseen is None:
            traceback.print_exc()
        else:
            print(f"Error: {error}", file=sys.stderr, flush=True)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def wait_for(pids: dict[int, int]) -> list[int]:
    """Exit codes by rank; once one has failed, the others are stopped."""
    codes = dict.fromkeys(pids.values(), 0)
    running = dict(pids)
    while running:
        pid, status = os.wait()
        codes[running.pop(pid)] = code = os.waitstatus_to_exitcode(status)
        if code:
            for other in running:
                os.kill(other, signal.SIGTERM)
    return [codes[rank] for rank in sorted(codes)]


def main() -> None:
    answers = int(sys.argv[1])  # a pipe of its own, since DeepSpeed talks on standard output
    for line in sys.stdin:
        order = json.loads(line)
        port = free_port()
        pids = {}
        for rank in range(order["ranks"]):
            pid = os.fork()
            if pid == 0:
                become_rank(order, rank, port)
            pids[pid] = rank
        os.write(answers, (json.dumps(wait_for(pids)) + "\n").encode())


if __name__ == "__main__":
    main()
