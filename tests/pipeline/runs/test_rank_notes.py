"""Which rank ended a run: the one that was killed, before those that failed because of it."""

import os
import socket

from pipeline.runs.rank_notes import RankNotes, culprits


def begin(folder, ranks):
    return [RankNotes(folder, rank) for rank in range(ranks)]


def test_a_killed_rank_is_named_before_the_one_whose_connection_broke(tmp_path):
    notes = begin(tmp_path, 3)
    notes[0].ended("RuntimeError: Connection closed by peer", at_fault=True)
    notes[2].ended("told to stop", at_fault=False)
    assert culprits(tmp_path) == f"rank 1 (process {os.getpid()} on {socket.gethostname()}) was killed"


def test_the_first_that_failed_is_named(tmp_path):
    notes = begin(tmp_path, 3)
    notes[2].ended("ValueError: of its own", at_fault=True)
    os.utime(tmp_path / "2.ended", ns=(0, 0))
    notes[0].ended("RuntimeError: Connection closed by peer", at_fault=True)
    notes[1].ended("told to stop", at_fault=False)
    assert culprits(tmp_path) == "rank 2 failed with ValueError: of its own"


def test_what_a_rank_said_first_stands(tmp_path):
    [note] = begin(tmp_path, 1)
    note.ended("ValueError: of its own", at_fault=True)
    note.ended("told to stop", at_fault=False)
    assert "of its own" in culprits(tmp_path)


def test_nobody_is_named_where_all_finished_or_none_began(tmp_path):
    assert culprits(tmp_path) == ""
    for note in begin(tmp_path, 2):
        note.ended("finished", at_fault=False)
    assert culprits(tmp_path) == ""
