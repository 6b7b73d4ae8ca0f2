"""A Ray cluster of several nodes on this machine, and which processes live on it."""

import os
import select
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests import ROOT, stand_in


class RayCluster:
    """folder: of its sessions; its name is in the command line of all that Ray starts."""

    def __init__(self, cluster, folder: Path) -> None:
        self._cluster, self.folder, self.address = cluster, folder, cluster.address

    def add_node(self, cpus: float):
        with _environment_of_nodes(self.folder):
            return self._cluster.add_node(num_cpus=cpus, object_store_memory=100 << 20)

    def end_node(self, node) -> None:
        """As a machine that loses power."""
        self._cluster.remove_node(node, allow_graceful=False)

    def actors(self) -> list[int]:
        return [pid for pid in _processes() if _command(pid).startswith("ray::Host") and self._has(_parent(pid))]

    def engines(self) -> list[int]:
        actors = set(self.actors())
        return [pid for pid in _processes() if "pipeline.engine.server" in _command(pid) and _parent(pid) in actors]

    def _has(self, pid: int) -> bool:
        return str(self.folder) in _command(pid)


@contextmanager
def ray_cluster(cpus: float):
    """A cluster whose engines are stand-ins, with one node of so many CPUs."""
    from ray.cluster_utils import Cluster

    with tempfile.TemporaryDirectory(prefix="rc-", dir="/tmp") as name:
        folder = Path(name)
        (folder / "ray").mkdir()
        with _environment_of_nodes(folder):
            head = {"num_cpus": cpus, "include_dashboard": False, "temp_dir": name, "object_store_memory": 100 << 20}
            cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            yield RayCluster(cluster, folder)
        finally:
            cluster.shutdown()


@contextmanager
def _environment_of_nodes(folder: Path):
    """RAY_TMPDIR: where Ray notes the address, which every process of this machine would find elsewhere."""
    environment = {"RAY_TMPDIR": str(folder), "RAY_worker_niceness": "0", "RAY_AUTH_MODE": "disabled"}
    environment |= stand_in.environment({})
    environment["PYTHONPATH"] = os.pathsep.join([environment["PYTHONPATH"], str(ROOT)])
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield


@contextmanager
def another_job(cluster: RayCluster, cpus: float):
    """A process beside this one that holds CPUs of the cluster."""
    code = f"""
import ray, sys
ray.init(address={cluster.address!r}, logging_level="ERROR", log_to_driver=False)
group = ray.util.placement_group([{{"CPU": {cpus}}}])
print(group.wait(60), flush=True)
sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as job:
        assert job.stdin is not None and job.stdout is not None
        assert job.stdout.readline() == "True\n"
        yield
        job.stdin.close()


def processes_under(home: Path) -> list[int]:
    """Those that inherited a stage's REFCACHE_HOME: its cluster, actors and engines."""
    wanted = f"REFCACHE_HOME={home}".encode()
    return [pid for pid in _processes() if wanted in _read(pid, "environ").split(b"\0")]


def gone(find, seconds: float = 30.0) -> bool:
    """Whether all processes that `find()` lists, and those that they start meanwhile, end within so many seconds."""
    deadline = time.monotonic() + seconds
    while left := find():
        for pid in left:
            try:
                descriptor = os.pidfd_open(pid)
            except ProcessLookupError:
                continue
            ended = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]
            os.close(descriptor)
            if not ended:
                return False
    return True


def _processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:  # it has ended
        return b""


def _command(pid: int) -> str:
    return _read(pid, "cmdline").replace(b"\0", b" ").decode(errors="replace")


def _parent(pid: int) -> int:
    status = _read(pid, "stat").rpartition(b") ")[2].split()
    return int(status[1]) if status else 0
