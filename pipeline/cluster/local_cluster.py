"""A Ray cluster of this machine alone, in a process of its own: `python -m pipeline.cluster.local_cluster FOLDER`.

It prints its address, and stops when its standard input ends: when the stage closes it, or dies in whatever way. The
stage can't be that process: where a driver is killed, Ray 2.60 leaves its agents (runtime_env, dashboard) behind for a
minute and its folder for ever.
"""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Self

from pipeline.children import child_environment
from pipeline.errors import RunFailed

OBJECT_STORE_BYTES = 256 << 20  # shared memory; a call with its answer takes a megabyte or two
STOP_SECONDS = 20


class LocalCluster:
    """The stage's side; a context manager. address: for ray.init; the cluster has this machine's CPUs and GPUs."""

    def __init__(self) -> None:
        # Not TMPDIR, which may be long: Ray adds 60 characters for sockets, and Linux allows 107.
        self._folder = Path(tempfile.mkdtemp(prefix="refcache-ray-", dir="/tmp"))
        # A token of this process, which connects with it: without one anybody on the network could run code here (Ray
        # listens on the machine's address, whatever it is told), and Ray's own choice is a file in the user's home.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pipeline.cluster.local_cluster", str(self._folder)],
            env=child_environment() | {"RAY_USAGE_STATS_ENABLED": "0"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(self._folder / "stderr").open("wb"),
            start_new_session=True,  # Ctrl-C is the stage's to handle
        )

    @property
    def address(self) -> str:
        """Waits until the cluster is up. Raises RunFailed where it won't start."""
        assert self._process.stdout is not None
        found = self._process.stdout.readline().decode().strip()
        if not found:
            said = (self._folder / "stderr").read_text(errors="replace").strip().splitlines()[-5:]
            raise RunFailed("Ray did not start on this machine:\n" + "\n".join(f"  {line}" for line in said))
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=STOP_SECONDS)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._process.stdout.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def main() -> None:
    folder = sys.argv[1]
    os.environ.pop("RAY_ADDRESS", None)
    os.environ.setdefault("RAY_worker_niceness", "0")  # else 15, and the engines would inherit it
    import ray

    try:
        context = ray.init(
            address="local",
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            log_to_driver=False,
            logging_level="ERROR",
            _temp_dir=folder,
        )
        with suppress(BrokenPipeError):  # the stage is gone already
            print(context.address_info["gcs_address"], flush=True)
        sys.stdin.read()
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
