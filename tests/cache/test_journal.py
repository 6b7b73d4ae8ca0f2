"""What a journal keeps, whatever was cut off, damaged or repeated."""

import logging
import struct
from itertools import pairwise

import pyarrow as pa
import pytest

from cache import CacheCorrupt, CacheError, CacheMismatch, Journal
from tests.cache.rows import keys_of, make_rows


@pytest.fixture
def three_batches(tmp_path):
    """A journal file of rows 0..2, 3..5, 6..8, and the offsets at which its frames begin and end."""
    offsets = []
    with Journal(tmp_path) as journal:
        offsets.append(journal.path.stat().st_size)
        for first in (0, 3, 6):
            journal.append(make_rows(first, first + 3))
            offsets.append(journal.path.stat().st_size)
    return journal.path, offsets


def read(folder):
    with Journal(folder) as journal:
        return pa.concat_tables([make_rows(0, 0), *journal.tables()])


def test_rows_come_back_as_they_were_appended(three_batches, tmp_path):
    assert read(tmp_path).equals(make_rows(0, 9))
    with Journal(tmp_path) as journal:
        assert journal.keys() == set(keys_of(make_rows(0, 9)))


def test_a_new_journal_is_empty(tmp_path):
    assert read(tmp_path / "deep" / "folder").num_rows == 0


def test_rows_are_readable_while_the_journal_grows(tmp_path):
    with Journal(tmp_path) as journal:
        for last in (3, 6):
            journal.append(make_rows(last - 3, last))
            assert journal.keys() == set(keys_of(make_rows(0, last)))


def test_of_a_repeated_key_the_first_row_counts(tmp_path):
    with Journal(tmp_path) as journal:
        journal.append(make_rows(0, 4))
        journal.append(make_rows(2, 6, shift=1.0))
    assert read(tmp_path).equals(pa.concat_tables([make_rows(0, 4), make_rows(4, 6, shift=1.0)]))


@pytest.mark.slow
def test_a_tail_torn_at_any_byte_costs_only_its_own_batch(three_batches, tmp_path):
    path, offsets = three_batches
    whole, first_six = path.read_bytes(), set(keys_of(make_rows(0, 6)))
    for cut in range(offsets[2], offsets[3]):
        path.write_bytes(whole[:cut])
        with Journal(tmp_path) as journal:
            assert journal.keys() == first_six
        assert path.stat().st_size == offsets[2]
    with Journal(tmp_path) as journal:
        journal.append(make_rows(6, 9))
    assert read(tmp_path).equals(make_rows(0, 9))


def test_a_tail_of_zeros_as_a_power_cut_leaves_it_is_cut_off(three_batches, tmp_path):
    path, offsets = three_batches
    path.write_bytes(path.read_bytes() + bytes(5000))
    assert read(tmp_path).equals(make_rows(0, 9))
    assert path.stat().st_size == offsets[3]


def test_a_flipped_byte_anywhere_costs_only_the_batch_it_is_in(three_batches, tmp_path):
    path, offsets = three_batches
    whole = path.read_bytes()
    others = set(keys_of(make_rows(0, 3))) | set(keys_of(make_rows(6, 9)))
    for position in range(offsets[1], offsets[2], 3):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with Journal(tmp_path) as journal:
            assert journal.keys() == others
        assert path.stat().st_size == len(whole)  # nothing intact was cut away


def test_damage_inside_the_journal_is_logged(three_batches, tmp_path, caplog):
    path, offsets = three_batches
    whole = bytearray(path.read_bytes())
    whole[offsets[1] + 40] ^= 1
    path.write_bytes(whole)
    with caplog.at_level(logging.WARNING), Journal(tmp_path) as journal:
        journal.append(make_rows(3, 6))
        assert journal.keys() == set(keys_of(make_rows(0, 9)))
    assert f"bytes {offsets[1]} to {offsets[2]} are damaged" in caplog.text


def test_a_row_that_must_not_be_stored_leaves_the_journal_as_it_was(three_batches, tmp_path):
    path, _ = three_batches
    before = path.read_bytes()
    bad = make_rows(9, 11, shift=-5.0)
    with Journal(tmp_path) as journal, pytest.raises(CacheError, match=keys_of(bad)[0].hex()):
        journal.append(bad)
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"RCJ", b"PAR1 something else entirely"])
def test_a_file_that_is_no_journal_is_left_alone(tmp_path, content):
    (tmp_path / "rows.journal").write_bytes(content)
    with pytest.raises(CacheCorrupt, match="no refcache journal"):
        read(tmp_path)
    assert (tmp_path / "rows.journal").read_bytes() == content


def test_a_journal_of_a_newer_version_is_left_alone(three_batches, tmp_path):
    path, _ = three_batches
    newer = b"RCJOURNL" + struct.pack("<I", 2) + path.read_bytes()[12:]
    path.write_bytes(newer)
    with pytest.raises(CacheMismatch, match=r"format version 2.*Upgrade"):
        read(tmp_path)
    assert path.read_bytes() == newer


def test_appending_costs_what_the_batch_costs(tmp_path):
    with Journal(tmp_path) as journal:
        sizes = [journal.path.stat().st_size]
        for first in range(0, 300, 10):
            journal.append(make_rows(first, first + 10))
            sizes.append(journal.path.stat().st_size)
    growth = [after - before for before, after in pairwise(sizes)]
    assert max(growth) < 1.2 * min(growth)


def test_a_journal_in_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CacheError, match=r"open the journal .*: (Not a directory|File exists)"):
        read(tmp_path / "file" / "journal")


def test_use_outside_the_with_block_is_refused(tmp_path):
    with pytest.raises(RuntimeError, match="with Journal"):
        Journal(tmp_path).append(make_rows(0, 1))
