"""Disk full, read-only, no permission, over quota: the reason in words, nothing lost, and on it goes afterwards."""

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from cache import CacheError, Journal, open_reference, publish_reference, verify
from cache.garbage import compact_journal, journalled_keys
from cache.repair import set_aside
from tests.cache import processes
from tests.cache.rows import identity, keys_of, make_rows

NOBODY = 65534
STEP = 40  # rows


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 384 KiB."""
    if os.getuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting needs root; RLIMIT_FSIZE stands in elsewhere")
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=384k", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount a tmpfs: {done.stderr.strip()}; RLIMIT_FSIZE stands in elsewhere")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill_up(disk: Path) -> Path:
    """Take all the space that is left; deleting the returned file gives it back."""
    ballast = disk / "ballast"
    with open(ballast, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return ballast


def rows_in(journal: Path) -> pa.Table:
    with Journal(journal) as opened:
        return pa.concat_tables([make_rows(0, 0), *opened.tables()])


def state(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "lock"}


def require_refused(doing, reason: str, kept: str) -> None:
    with pytest.raises(CacheError) as raised:
        doing()
    assert type(raised.value) is CacheError  # not one of its kinds: nothing is wrong with the files
    assert reason.lower() in str(raised.value).lower() and kept in str(raised.value)
    assert "Remove the cause and run the same command again." in str(raised.value)


def test_a_full_disk_stops_appending_and_loses_no_row(disk):
    stored = 0
    with Journal(disk / "journal") as journal:
        ballast = fill_up(disk)
        os.truncate(ballast, ballast.stat().st_size - 64 * 1024)

        def append_for_ever():
            nonlocal stored
            while True:
                journal.append(make_rows(stored, stored + STEP))
                stored += STEP

        require_refused(append_for_ever, "No space left on device", "no row journalled before is lost")
        assert journal.keys() == set(keys_of(make_rows(0, stored))) and stored > 0
        require_refused(append_for_ever, "No space left on device", "The journal is intact")
        ballast.unlink()
        journal.append(make_rows(stored, stored + STEP))
    assert rows_in(disk / "journal").equals(make_rows(0, stored + STEP))


def test_a_journal_opens_on_a_full_disk(disk):
    with Journal(disk / "journal") as journal:
        journal.append(make_rows(0, STEP))
    fill_up(disk)
    assert rows_in(disk / "journal").equals(make_rows(0, STEP))


def test_a_full_disk_stops_publishing_and_keeps_what_was_published(disk):
    publish_reference(disk / "logps", make_rows(0, 50), identity())
    before, ballast = state(disk / "logps"), fill_up(disk)
    os.truncate(ballast, ballast.stat().st_size - 8192)
    new = make_rows(0, 900)
    require_refused(
        lambda: publish_reference(disk / "logps", new, identity()),
        "No space left on device",
        "What was published before is intact",
    )
    assert state(disk / "logps") == before and verify(disk / "logps") == []
    ballast.unlink()
    publish_reference(disk / "logps", new, identity())
    assert open_reference(disk / "logps", expect=identity()).keys() == set(keys_of(new))


def test_a_full_disk_stops_compaction_and_keeps_the_journal(disk):
    with Journal(disk / "journal") as journal:
        journal.append(make_rows(0, 600))
    before, needed, ballast = state(disk / "journal"), set(keys_of(make_rows(0, 590))), fill_up(disk)
    os.truncate(ballast, ballast.stat().st_size - 16384)
    require_refused(lambda: compact_journal(disk / "journal", needed), "No space left on device", "intact")
    assert state(disk / "journal") == before
    ballast.unlink()
    assert compact_journal(disk / "journal", needed).dropped_rows == 10
    assert rows_in(disk / "journal").equals(make_rows(0, 590))


def test_a_full_disk_stops_moving_aside_and_deletes_nothing(disk, tmp_path):
    publish_reference(tmp_path / "logps", make_rows(0, 900), identity())
    before = state(tmp_path / "logps")
    fill_up(disk)
    (shard,) = (tmp_path / "logps").glob("*.parquet")
    require_refused(
        lambda: set_aside(tmp_path / "logps", [shard.name], disk / "damaged" / "x"),
        "No space left on device",
        "Nothing was deleted",
    )
    assert state(tmp_path / "logps") == before


def test_a_read_only_disk_is_refused_in_words_and_can_still_be_read(disk):
    publish_reference(disk / "logps", make_rows(0, 50), identity())
    with Journal(disk / "journal") as journal:
        journal.append(make_rows(0, STEP))
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    for write in (
        lambda: Journal(disk / "journal").__enter__(),
        lambda: Journal(disk / "new").__enter__(),
        lambda: publish_reference(disk / "logps", make_rows(0, 60), identity()),
        lambda: compact_journal(disk / "journal", set()),
    ):
        require_refused(write, "Read-only file system", "")
    assert journalled_keys(disk / "journal") == set(keys_of(make_rows(0, STEP)))
    assert open_reference(disk / "logps", expect=identity()).keys() == set(keys_of(make_rows(0, 50)))
    subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
    with Journal(disk / "journal") as journal:
        journal.append(make_rows(STEP, 2 * STEP))
    assert rows_in(disk / "journal").equals(make_rows(0, 2 * STEP))


def as_nobody(target, *arguments) -> tuple[str, str] | None:
    if os.getuid() != 0:
        pytest.skip("becoming another user needs root")
    receiver, sender = processes.context.Pipe(duplex=False)
    assert processes.run(processes.run_as, NOBODY, target, arguments, sender) == 0
    return receiver.recv()


@pytest.mark.parametrize("target", [processes.append, processes.publish_some, processes.compact])
def test_a_folder_of_somebody_else_is_refused_in_words(tmp_path, target):
    tmp_path.chmod(0o755)
    publish_reference(tmp_path / "logps", make_rows(0, 50), identity())
    with Journal(tmp_path / "journal") as journal:
        journal.append(make_rows(0, STEP))
    before = state(tmp_path / "logps") | state(tmp_path / "journal")
    kind, message = as_nobody(target, tmp_path)
    assert kind == "CacheError" and "Permission denied" in message and "run the same command again" in message
    assert state(tmp_path / "logps") | state(tmp_path / "journal") == before


def test_a_quota_is_refused_in_words_and_loses_no_row(tmp_path, monkeypatch):
    """Raised by hand, half-way through a frame: a file system with quotas can't be had for a test."""
    write = os.pwrite

    def over_quota(file: int, data: memoryview, position: int) -> int:
        if position > 10_000:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        return write(file, data[:1000], position)

    stored = 0
    with Journal(tmp_path / "journal") as journal:

        def append_for_ever():
            nonlocal stored
            while True:
                journal.append(make_rows(stored, stored + STEP))
                stored += STEP

        monkeypatch.setattr(os, "pwrite", over_quota)
        require_refused(append_for_ever, "quota exceeded", "The journal is intact")
        monkeypatch.undo()
        assert stored > 0 and journal.keys() == set(keys_of(make_rows(0, stored)))
        journal.append(make_rows(stored, stored + STEP))
    assert rows_in(tmp_path / "journal").equals(make_rows(0, stored + STEP))
