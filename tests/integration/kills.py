"""For kill tests: stages to kill, and the journal as it lies on disk, read by the format's description alone."""

import json
import os
import select
import signal
import struct
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pyarrow as pa

from cache import response_key
from tests import ROOT, stand_in
from tests.scoring_project import PARAMS


def journalled(home: Path) -> Counter[bytes]:
    """How often each key stands in the one journal under `home`; a torn end is left out."""
    return Counter(key for rows in _tables(home) for key in rows["response_key"].to_pylist())


def journalled_logps(home: Path) -> pl.DataFrame:
    """The rows of log-probs in the journals under `home`, by key."""
    tables = [rows for rows in _tables(home) if "token_logps" in rows.column_names]
    return pl.concat([pl.DataFrame(pl.from_arrow(rows)) for rows in tables]).sort("response_key")


def _tables(home: Path) -> Iterator[pa.Table]:
    for journal in home.glob("journal/*/rows.journal"):
        for payload in _payloads(journal.read_bytes()):
            yield pa.ipc.open_stream(payload).read_all()


def _payloads(content: bytes) -> Iterator[bytes]:
    assert content[:8] == b"RCJOURNL"
    position = 12
    while len(content) >= position + 20:
        magic, length, checksum = struct.unpack_from("<8sQI", content, position)
        payload = content[position + 20 : position + 20 + length]
        if magic != b"\xf1RCFRAME" or len(payload) < length or zlib.crc32(payload) != checksum:
            return
        yield payload
        position += 20 + length


def asked(file: Path) -> list[bytes]:
    """The keys of all rows that reached a stand-in engine, in order, from the file named in its wish."""
    lines = file.read_text().splitlines() if file.exists() else []
    return [response_key(*row) for line in lines for row in json.loads(line)]


def published(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def shards(folder: Path) -> dict[str, bytes]:
    """The manifest and what it lists, without companions such as drift.json, which hang on other params."""
    return {name: content for name, content in published(folder).items() if name.split(".")[0] != "drift"}


class Nursery:
    """Starts score stages (stage_nursery.py) and tells how they ended; a context manager.

    engines: where the stages' engines come from, vLLM included; without, they start their own, for a stand-in. pid: of
    the last stage.
    """

    def __init__(self, engines=None):
        descriptors = [engines.socket.fileno()] if engines else []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.integration.stage_nursery", *map(str, descriptors)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            pass_fds=descriptors,
        )

    def score(self, place, moments=(), *, wish=None, kill_after=None, **params):
        """Run a stage to its end, its death, or SIGKILL after `kill_after` seconds; returns its status and output."""
        environment = {"REFCACHE_HOME": str(place.home)} | (stand_in.environment(wish) if wish is not None else {})
        output = place.root / "output"
        order = {
            "arguments": [
                *map(str, (place.pairs, place.model, place.out, place.metrics)),
                (PARAMS.model_copy(update=params)).model_dump(),
            ],
            "environment": environment,
            "output": str(output),
            "moments": moments,
        }
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        pid = self.pid = int(self.process.stdout.readline())
        if kill_after is not None:
            assert not select.select([self.process.stdout], [], [], kill_after)[0], output.read_text()
            os.kill(pid, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(int(self.process.stdout.readline()))
        return status, output.read_text()

    def __enter__(self):
        return self

    def __exit__(self, *raised):
        self.process.stdin.close()
        self.process.wait()
