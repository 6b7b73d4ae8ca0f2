"""A second writer is refused at once, with the first one's pid and host, whichever door it takes."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time

import pytest

from cache import CacheLocked, Journal, lock, publish_reference
from cache.garbage import compact_journal
from tests import ROOT
from tests.cache.rows import identity, make_rows

# A stage as dvc starts it: a child in a shell, which lives on when its parent is killed.
STAGE = """
    import sys
    from pathlib import Path
    from cache import Journal
    from tests.cache.rows import make_rows

    with Journal(Path(sys.argv[1])) as journal:
        journal.append(make_rows(0, 5))
        print(__import__("os").getpid(), flush=True)
        sys.stdin.read()
"""
PARENT = """
    import subprocess, sys, time
    subprocess.Popen([sys.executable, "-c", sys.argv[2], sys.argv[1]])
    time.sleep(600)
"""


@pytest.mark.slow
def test_the_orphan_of_a_killed_parent_keeps_second_writers_out_until_it_ends(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", textwrap.dedent(PARENT), str(tmp_path), textwrap.dedent(STAGE)]
    parent = subprocess.Popen(words, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    orphan = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    os.kill(orphan, 0)  # it lives, and holds the lock
    for write in (lambda: Journal(tmp_path).__enter__(), lambda: compact_journal(tmp_path, set())):
        started = time.perf_counter()
        with pytest.raises(CacheLocked) as refused:
            write()
        assert time.perf_counter() - started < 1
        assert f"pid {orphan} on host {socket.gethostname()}" in str(refused.value)
        assert "a killed `dvc` can leave its stage running" in str(refused.value)
    os.kill(orphan, signal.SIGKILL)
    parent.stdout.read()  # its end of file is the orphan's end
    with Journal(tmp_path) as journal:
        assert len(journal.keys()) == 5


def test_a_second_publisher_is_told_who_holds_the_folder_also_from_another_process(tmp_path):
    code = "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], 0), 2); print(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        holder.stdout.readline()
        with pytest.raises(CacheLocked, match=f"pid {holder.pid} on host {socket.gethostname()}"):
            publish_reference(tmp_path, make_rows(0, 5), identity())
        holder.stdin.close()
    publish_reference(tmp_path, make_rows(0, 5), identity())


def test_where_the_system_does_not_say_the_holder_is_another_process(tmp_path, monkeypatch):
    folder = os.open(tmp_path, os.O_RDONLY)
    assert lock.holder_of(folder) == "another process"  # nobody holds it
    monkeypatch.setattr(lock, "LOCKS", tmp_path / "absent")
    assert lock.holder_of(folder) == "another process"
    os.close(folder)
