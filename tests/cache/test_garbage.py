"""Compacting a journal: exactly the unneeded rows go, killed at any moment nothing else does."""

import os
import shutil

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cache import CacheCorrupt, CacheLocked, Journal, garbage
from cache.garbage import (
    compact_journal,
    drop_journal,
    find_journals,
    journalled_keys,
    peek_journal,
    plan_compaction,
)
from tests.cache import processes
from tests.cache.rows import identity, keys_of, make_rows

N_ROWS = 40
KEYS = keys_of(make_rows(0, N_ROWS))


def fill(folder, batches):
    with Journal(folder) as journal:
        for start, stop in batches:
            journal.append(make_rows(start, stop))


def read(folder):
    with Journal(folder) as journal:
        return pa.concat_tables([make_rows(0, 0), *journal.tables()])


def tree(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


batches = st.lists(st.tuples(st.integers(0, N_ROWS - 1), st.integers(1, 9)), min_size=1, max_size=6)


@given(batches, st.sets(st.integers(0, N_ROWS - 1)))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_needed_row_stays_bit_for_bit_and_every_other_goes(tmp_path, batches, kept):
    shutil.rmtree(tmp_path / "j", ignore_errors=True)
    fill(tmp_path / "j", [(start, min(start + length, N_ROWS)) for start, length in batches])
    before, needed = read(tmp_path / "j"), {KEYS[i] for i in kept}
    whole = tree(tmp_path / "j")
    planned = plan_compaction(tmp_path / "j", needed)
    assert tree(tmp_path / "j") == whole
    done = compact_journal(tmp_path / "j", needed)
    assert read(tmp_path / "j").equals(before.filter(pa.array([key in needed for key in keys_of(before)], pa.bool_())))
    assert (done.kept_rows, done.dropped_rows) == (planned.kept_rows, planned.dropped_rows)
    assert done.kept_bytes == (tmp_path / "j" / "rows.journal").stat().st_size
    again = compact_journal(tmp_path / "j", needed)
    assert (again.kept_rows, again.dropped_rows, again.dropped_bytes) == (done.kept_rows, 0, 0)


def test_small_frames_are_joined_and_large_ones_bounded(tmp_path, monkeypatch):
    fill(tmp_path, [(i, i + 1) for i in range(N_ROWS)])
    monkeypatch.setattr(garbage, "FRAME_BYTES", make_rows(0, 10).nbytes)
    compact_journal(tmp_path, set(KEYS[1:]))
    sizes = [rows.num_rows for _, rows in peek_journal(tmp_path)]
    assert sum(sizes) == N_ROWS - 1 and 2 <= len(sizes) <= 8
    assert read(tmp_path).equals(make_rows(1, N_ROWS))


def test_a_compacted_journal_grows_on(tmp_path):
    fill(tmp_path, [(0, 20)])
    compact_journal(tmp_path, set(KEYS[:5]))
    fill(tmp_path, [(20, 30)])
    assert read(tmp_path).equals(pa.concat_tables([make_rows(0, 5), make_rows(20, 30)]))


@pytest.mark.slow
def test_killed_before_any_change_there_is_the_old_or_the_new_journal(tmp_path):
    fill(tmp_path / "start", [(0, 20), (20, N_ROWS)])
    needed, seen, code, step = set(KEYS[::3]), [], processes.KILLED, 0
    old, new = make_rows(0, N_ROWS), make_rows(0, N_ROWS).take(list(range(0, N_ROWS, 3)))
    while code == processes.KILLED:
        folder = tmp_path / f"killed-{step}"
        shutil.copytree(tmp_path / "start", folder)
        code = processes.run(processes.compact_dying_before_change, folder, needed, step)
        found = read(folder)
        seen.append("old" if found.equals(old) else "new" if found.equals(new) else "neither")
        compact_journal(folder, needed)
        assert read(folder).equals(new) and {p.name for p in folder.iterdir()} == {"lock", "rows.journal"}
        step += 1
    assert code == 0 and step > 5
    assert seen == ["old"] * seen.count("old") + ["new"] * seen.count("new") and set(seen) == {"old", "new"}


def test_a_running_writer_is_never_disturbed(tmp_path):
    fill(tmp_path, [(0, 20)])
    ready, ready_end = processes.context.Pipe(duplex=False)
    stop_end, stop = processes.context.Pipe(duplex=False)
    writer = processes.start(processes.hold, tmp_path, ready_end, stop_end)
    pid, before = ready.recv(), tree(tmp_path)
    for change in (lambda: compact_journal(tmp_path, set()), lambda: drop_journal(tmp_path)):
        with pytest.raises(CacheLocked, match=f"pid {pid} on host"):
            change()
    assert journalled_keys(tmp_path) == set(KEYS[:20])  # looking needs no lock
    assert tree(tmp_path) == before
    stop.send(None)
    writer.join()


def test_looking_steps_over_a_torn_tail_without_cutting_it(tmp_path):
    fill(tmp_path, [(0, 20), (20, 30)])
    file = tmp_path / "rows.journal"
    os.truncate(file, file.stat().st_size - 1)
    before = tree(tmp_path)
    assert journalled_keys(tmp_path) == set(KEYS[:20])
    assert plan_compaction(tmp_path, set(KEYS)).kept_rows == 20
    assert tree(tmp_path) == before


def test_looking_at_no_journal_finds_nothing_and_at_another_file_raises(tmp_path):
    assert journalled_keys(tmp_path) == set() and list(tmp_path.iterdir()) == []
    (tmp_path / "rows.journal").write_text("something else")
    with pytest.raises(CacheCorrupt, match="no refcache journal"):
        journalled_keys(tmp_path)


def test_journals_are_found_with_those_inside_them(tmp_path):
    fill(tmp_path / "b", [(0, 1)])
    fill(tmp_path / "a", [(0, 1)])
    fill(tmp_path / "a" / "rescored", [(0, 1)])
    fill(tmp_path / "a" / garbage.BUILDING, [(0, 1)])
    assert find_journals(tmp_path) == [tmp_path / "a", tmp_path / "a" / "rescored", tmp_path / "b"]
    assert find_journals(tmp_path / "absent") == []


def test_a_dropped_journal_leaves_only_its_lock_and_starts_anew(tmp_path):
    from cache.identity import record_identity

    fill(tmp_path, [(0, 20)])
    record_identity(tmp_path, identity())
    drop_journal(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["lock"] and find_journals(tmp_path) == []
    fill(tmp_path, [(5, 9)])
    assert read(tmp_path).equals(make_rows(5, 9))
