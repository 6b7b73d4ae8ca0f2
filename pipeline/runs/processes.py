"""Start training ranks as processes: one directly, several through DeepSpeed's launcher, several machines through its
hostfile. The stage that starts them holds no model."""

import base64
import ctypes
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.children import child_environment
from pipeline.errors import RequestError
from pipeline.runs.ports import free_port

HOSTFILE, OPTIONS = "REFCACHE_HOSTFILE", "REFCACHE_LAUNCHER_OPTIONS"


@contextmanager
def running_ranks(job: Path, ranks: int, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Processes that run worker.py on `job`; what they print is appended to `log`. Stopped on an exception."""
    hosts = hostfile(ranks)
    command, environment = rank_command(job, ranks, hosts), _environment(ranks)
    if hosts:
        environment["DS_ENV_FILE"] = str(_exported(environment, job.with_name("environment")))
    with log.open("ab") as output:
        processes = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )
        try:
            yield processes
        except BaseException:
            _stop(processes)
            raise


def hostfile(ranks: int) -> Path | None:
    """The file that $REFCACHE_HOSTFILE names, None without; RequestError unless its slots are as many as `ranks`.

    One rank needs no other machine, so that `dvc repro` can run an sft of one rank before a training of many.
    """
    if not os.environ.get(HOSTFILE) or ranks == 1:
        return None
    file = Path(os.environ[HOSTFILE]).absolute()
    if not file.is_file():
        raise RequestError(f"{HOSTFILE} names {file}, which does not exist. It lists one `HOST slots=N` a line.")
    slots = [int(n) for n in re.findall(r"^\s*[^#\s]+\s+slots=(\d+)", file.read_text(), re.MULTILINE)]
    if sum(slots) != ranks:
        raise RequestError(
            f"{file} has {sum(slots)} slots on {len(slots)} hosts, but ranks is {ranks} in the params. "
            f"Set ranks to {sum(slots)}, change the slots, or unset {HOSTFILE} to train on this machine alone."
        )
    return file


def rank_command(job: Path, ranks: int, hosts: Path | None) -> list[str]:
    """The words that start `ranks` ranks on `job`: here, or on the hosts of a hostfile."""
    python, worker = [sys.executable, "-u", "-m"], ["pipeline.runs.worker", str(job)]
    if hosts:
        options = ["--hostfile", str(hosts), "--master_port", str(free_port())]
        options += shlex.split(os.environ.get(OPTIONS, ""))
        return [*python, "deepspeed.launcher.runner", *options, "--module", *worker]
    if ranks == 1:
        return [*python, *worker]
    # What DeepSpeed's runner would start after some seconds; and the runner takes no notice of CUDA_VISIBLE_DEVICES.
    devices = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    ids = devices.split(",") if devices else [str(n) for n in range(ranks)]
    if len(ids) < ranks:
        raise RequestError(
            f"ranks is {ranks} in the params, but CUDA_VISIBLE_DEVICES={devices} has {len(ids)} devices."
        )
    world = base64.urlsafe_b64encode(json.dumps({"localhost": ids[:ranks]}).encode()).decode()
    options = [f"--world_info={world}", "--master_addr=127.0.0.1", f"--master_port={free_port()}", "--module"]
    return [*python, "deepspeed.launcher.launch", *options, *worker]


def _environment(ranks: int) -> dict[str, str]:
    environment = child_environment()
    if ranks == 1:
        environment |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    # Without these glibc returns every freed activation to the kernel; 4-10 % of a step on CPU.
    environment.setdefault("MALLOC_MMAP_MAX_", "0")
    environment.setdefault("MALLOC_TRIM_THRESHOLD_", str(16 << 30))
    # Threads that spin while they wait cost nothing alone and up to 50x on a machine that does anything else.
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    environment.setdefault("TOKENIZERS_PARALLELISM", "false")
    return environment


def _exported(environment: dict[str, str], file: Path) -> Path:
    """What the ranks on other hosts need of the environment, in the file that DeepSpeed's runner reads it from."""
    names = [
        name for name in environment if name.startswith(("MALLOC_", "OMP_", "TOKENIZERS_", "REFCACHE_HOME", "HF_"))
    ]
    file.write_text("".join(f"{name}={shlex.quote(environment[name])}\n" for name in names))
    return file


def _die_with_parent() -> None:
    """In the child before exec: SIGTERM when the stage dies, however it dies (Linux)."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _stop(ranks: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(ranks.pid, number)
            ranks.wait(timeout=10)
