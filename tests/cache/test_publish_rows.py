"""Publishing from journals and publications, partition by partition: the same files as from one table in memory."""

import os
import shutil
from contextlib import ExitStack

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cache import (
    CacheIncomplete,
    Journal,
    KeySet,
    open_reference,
    publish_reference,
    publish_rows,
    shards,
    spill,
    verify,
)
from tests.cache import processes
from tests.cache.rows import identity, keys_of, make_rows


@pytest.fixture
def small(monkeypatch):
    """Shards of ten rows, and hardly any of them in memory at once."""
    monkeypatch.setattr(shards, "SHARD_ROWS", 10)
    monkeypatch.setattr(spill, "BUFFER_BYTES", 500)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def table_publication(folder, rows):
    publish_reference(folder, rows, identity())
    return contents(folder)


def journal_of(folder, rows, batch=7):
    with Journal(folder) as journal:
        for start in range(0, rows.num_rows, batch):
            journal.append(rows.slice(start, batch))


def rows_publication(root, keys, journals, published=None):
    with ExitStack() as stack:
        sources = [stack.enter_context(Journal(folder)) for folder in journals]
        if published is not None:
            sources.append(open_reference(published, expect=identity()))
        publish_rows(root / "out", KeySet(keys), sources, identity(), scratch=root / "scratch")
    return contents(root / "out")


@pytest.mark.slow
@given(st.data())
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_division_among_sources_gives_the_files_of_one_table(tmp_path, small, data):
    n_rows = data.draw(st.integers(0, 80), label="rows")
    homes = data.draw(st.lists(st.integers(0, 2), min_size=n_rows, max_size=n_rows), label="source of each row")
    unwanted = data.draw(st.integers(0, 30), label="rows that nobody asks for")
    rows = make_rows(0, n_rows)
    for folder in tmp_path.iterdir():
        shutil.rmtree(folder)
    parts = [rows.filter(pa.array([home == i for home in homes], pa.bool_())) for i in range(3)]
    extra = make_rows(1000, 1000 + unwanted)
    journals = [tmp_path / "rescored", tmp_path / "journal"]
    for folder, part in zip(journals, parts, strict=False):
        journal_of(folder, pa.concat_tables([extra, part]))
    publish_reference(tmp_path / "published", pa.concat_tables([parts[2], extra]), identity())
    expected = table_publication(tmp_path / "table", rows)
    assert rows_publication(tmp_path, keys_of(rows), journals, tmp_path / "published") == expected
    assert verify(tmp_path / "out") == []
    assert list((tmp_path / "scratch").iterdir()) == []


@pytest.mark.slow
def test_growing_and_shrinking_from_its_own_publication_does_not_change_a_byte(tmp_path, small):
    """The source is the folder itself, whose partitions differ from those to be written."""
    rows = make_rows(0, 90)
    journal_of(tmp_path / "journal", rows)
    once = table_publication(tmp_path / "once", rows)
    rows_publication(tmp_path, keys_of(rows), [tmp_path / "journal"])
    for stop in (70, 9, 30):
        found = rows_publication(tmp_path, keys_of(make_rows(0, stop)), [], tmp_path / "out")
        assert found == table_publication(tmp_path / f"table-{stop}", make_rows(0, stop))
        rows_publication(tmp_path, keys_of(rows), [tmp_path / "journal"], tmp_path / "out")
    assert contents(tmp_path / "out") == once


def test_the_first_source_wins_and_of_a_journal_the_first_row(tmp_path, small):
    journal_of(tmp_path / "rescored", make_rows(10, 20, shift=1.0))
    journal_of(tmp_path / "journal", pa.concat_tables([make_rows(0, 40), make_rows(5, 30, shift=2.0)]))
    publish_reference(tmp_path / "published", make_rows(0, 60, shift=3.0), identity())
    sources = [tmp_path / "rescored", tmp_path / "journal"]
    found = rows_publication(tmp_path, keys_of(make_rows(0, 60)), sources, tmp_path / "published")
    parts = [make_rows(0, 10), make_rows(10, 20, shift=1.0), make_rows(20, 40), make_rows(40, 60, shift=3.0)]
    assert found == table_publication(tmp_path / "table", pa.concat_tables(parts))


@given(st.data())
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_keys_in_batches_of_pairs_are_as_good_as_a_set(tmp_path, small, data):
    """A pair's response may be in other pairs too, and most keys wait on disk."""
    n_rows = data.draw(st.integers(0, 60), label="rows")
    rows = make_rows(0, n_rows)
    row = st.integers(0, n_rows - 1)
    pairs = data.draw(st.lists(st.tuples(row, row), max_size=40), label="pairs") if n_rows else []
    for folder in tmp_path.iterdir():
        shutil.rmtree(folder)
    journal_of(tmp_path / "journal", rows)
    keys = keys_of(rows)
    columns = [pa.array([keys[pair[side]] for pair in pairs], pa.binary()) for side in (0, 1)]
    batches = pa.record_batch(columns, ["chosen_key", "rejected_key"])
    with Journal(tmp_path / "journal") as journal:
        batched = [batches.slice(start, 7) for start in range(0, len(pairs), 7)]
        publish_rows(tmp_path / "out", batched, [journal], identity(), scratch=tmp_path / "scratch")
    used = rows.take(pa.array(sorted({index for pair in pairs for index in pair}), pa.int64()))
    assert contents(tmp_path / "out") == table_publication(tmp_path / "table", used)
    assert list((tmp_path / "scratch").iterdir()) == []


def test_a_row_that_no_source_has_is_named_and_nothing_changes(tmp_path, small):
    before = table_publication(tmp_path / "out", make_rows(0, 30))
    journal_of(tmp_path / "journal", make_rows(0, 40))
    absent = keys_of(make_rows(50, 51))
    with pytest.raises(CacheIncomplete, match=rf"1 rows .* 1 sources: {absent[0].hex()}.*dvc repro score"):
        rows_publication(tmp_path, [*keys_of(make_rows(0, 40)), *absent], [tmp_path / "journal"])
    assert contents(tmp_path / "out") == before


def test_a_full_disk_leaves_what_was_published_and_the_journal(tmp_path):
    """The temporary files meet the limit first."""
    before = table_publication(tmp_path / "out", make_rows(0, 20))
    journal_of(tmp_path / "journal", make_rows(0, 3000), batch=1000)
    receiver, sender = processes.context.Pipe(duplex=False)
    assert processes.run(processes.publish_a_journal_under_a_file_size_limit, tmp_path, 3000, 30_000, sender) == 0
    kind, message = receiver.recv()
    assert kind == "CacheError" and f"publish to {tmp_path / 'out'}" in message and "so is the journal" in message
    assert contents(tmp_path / "out") == before
    assert list((tmp_path / "scratch").iterdir()) == []
    expected = table_publication(tmp_path / "table", make_rows(0, 3000))
    assert rows_publication(tmp_path, keys_of(make_rows(0, 3000)), [tmp_path / "journal"]) == expected


def test_temporary_files_of_killed_processes_go_and_those_in_use_stay(tmp_path):
    assert processes.run(processes.die_with_a_spill_folder, tmp_path) == processes.KILLED
    (left,) = tmp_path.iterdir()
    assert os.listdir(left) == ["00000.arrows"]
    with spill.spill_folder(tmp_path) as mine, spill.spill_folder(tmp_path) as other:
        assert {mine, other} == set(tmp_path.iterdir())
    assert list(tmp_path.iterdir()) == []
