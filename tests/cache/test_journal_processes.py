"""The journal against real processes: killed at random, competing, and out of space."""

import os
import random
import socket

import pyarrow as pa
import pytest

from cache import CacheLocked, Journal
from tests.cache import processes
from tests.cache.rows import keys_of, make_rows

KILLS = 12


@pytest.mark.slow
def test_every_acknowledged_row_survives_sigkill_at_random_moments(tmp_path):
    moments = random.Random(0)
    first = 0
    for _ in range(KILLS):
        receiver, sender = processes.context.Pipe(duplex=False)
        writer = processes.start(processes.append_for_ever, tmp_path, first, sender)
        assert receiver.recv() == first
        for _ in range(moments.randrange(4)):
            first = receiver.recv()
        writer.join(moments.uniform(0, 0.01))
        writer.kill()
        writer.join()
        while receiver.poll():
            first = receiver.recv()
        with Journal(tmp_path) as journal:
            stored = journal.keys()
        assert set(keys_of(make_rows(0, first))) <= stored
        first = len(stored)  # at most the batch whose acknowledgement the kill cut off
    with Journal(tmp_path) as journal:
        assert pa.concat_tables(journal.tables()).equals(make_rows(0, first))


def test_a_second_writer_is_refused_with_pid_and_host_and_let_in_afterwards(tmp_path):
    ready, ready_end = processes.context.Pipe(duplex=False)
    stop_end, stop = processes.context.Pipe(duplex=False)
    writer = processes.start(processes.hold, tmp_path, ready_end, stop_end)
    pid = ready.recv()
    with pytest.raises(CacheLocked, match=f"pid {pid} on host {socket.gethostname()}"), Journal(tmp_path):
        pass
    stop.send(None)
    writer.join()
    with Journal(tmp_path):
        pass


def test_a_second_writer_in_the_same_process_is_refused(tmp_path):
    with Journal(tmp_path), pytest.raises(CacheLocked, match=f"pid {os.getpid()} "), Journal(tmp_path):
        pass


def test_a_worker_that_outlives_its_killed_writer_does_not_keep_the_lock(tmp_path):
    ready, ready_end = processes.context.Pipe(duplex=False)
    stop_end, stop = processes.context.Pipe(duplex=False)
    assert processes.run(processes.hold_with_a_surviving_child, tmp_path, ready_end, stop_end) == processes.KILLED
    ready.recv()
    with Journal(tmp_path):
        pass
    stop.close()


@pytest.mark.parametrize("limit", [9_000, 20_001])
def test_a_full_disk_is_a_clear_error_and_the_journal_goes_on_when_there_is_space(tmp_path, limit):
    receiver, sender = processes.context.Pipe(duplex=False)
    assert processes.run(processes.append_under_a_file_size_limit, tmp_path, limit, sender) == 0
    stored, kind, message, nothing_left_behind = receiver.recv()
    assert stored > 0 and nothing_left_behind
    assert kind == "CacheError"
    assert "rows.journal: File too large." in message and "no row journalled before is lost" in message
    with Journal(tmp_path) as journal:
        assert pa.concat_tables(journal.tables()).equals(make_rows(0, stored + processes.BATCH))
