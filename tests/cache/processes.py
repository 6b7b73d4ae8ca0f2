"""Child processes that write: killed at a moment of the test's choosing, or at a chosen system call."""

import multiprocessing
import os
import resource
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from cache import Journal, KeySet, open_reference, open_view, publish_reference, publish_rows, spill
from cache.garbage import compact_journal
from tests.cache.rows import identity, keys_of, make_rows

# Children fork from a server that has loaded pyarrow (and pandas, which pyarrow imports for its first array) and runs
# no threads, so that a start costs milliseconds.
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["cache", "pandas", "tests.cache.rows"])

KILLED = 9
BATCH = 20  # rows


def start(target: Callable[..., None], *arguments: Any) -> Any:
    process = context.Process(target=target, args=arguments, daemon=True)
    process.start()
    return process


def run(target: Callable[..., None], *arguments: Any) -> int:
    """Run to the end; returns the exit code."""
    process = start(target, *arguments)
    process.join(60)
    assert process.exitcode is not None
    return int(process.exitcode)


def append_for_ever(folder: Path, first: int, acknowledge: Connection) -> None:
    """Append batch after batch, reporting each row number below which all is journalled."""
    with Journal(folder) as journal:
        acknowledge.send(first)
        while True:
            journal.append(make_rows(first, first + BATCH))
            first += BATCH
            acknowledge.send(first)


def hold(folder: Path, ready: Connection, stop: Connection) -> None:
    with Journal(folder):
        ready.send(os.getpid())
        stop.recv()


def hold_with_a_surviving_child(folder: Path, ready: Connection, stop: Connection) -> None:
    """Hold the journal and fork a worker, as an engine does; the worker outlives its parent."""
    with Journal(folder):
        if os.fork() == 0:
            ready.send(os.getpid())  # not before it has run: until then it shares the lock
            stop.poll(60)
            os._exit(0)
        os._exit(KILLED)


def append_under_a_file_size_limit(folder: Path, limit: int, outcome: Connection) -> None:
    """Append until the system refuses, then lift the limit and append once more."""
    with Journal(folder) as journal:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        stored, size = 0, journal.path.stat().st_size
        try:
            while True:
                journal.append(make_rows(stored, stored + BATCH))
                stored, size = stored + BATCH, journal.path.stat().st_size
        except Exception as error:
            outcome.send((stored, type(error).__name__, str(error), journal.path.stat().st_size == size))
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        journal.append(make_rows(stored, stored + BATCH))


def publish(folder: Path, start: int, stop: int, **changes: str) -> None:
    publish_reference(folder, make_rows(start, stop), identity(**changes))


def publish_under_a_file_size_limit(folder: Path, stop: int, limit: int, outcome: Connection) -> None:
    rows = make_rows(0, stop)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        publish_reference(folder, rows, identity())
    except Exception as error:
        outcome.send((type(error).__name__, str(error)))


def publish_dying_before_change(folder: Path, number: int, start: int, stop: int) -> None:
    """Publish, but die without any clean-up just before change number `number` to the folder's entries."""
    die_before_change(number)
    publish(folder, start, stop, weights="c3" * 32)


def compact_dying_before_change(folder: Path, needed: set[bytes], number: int) -> None:
    die_before_change(number)
    compact_journal(folder, needed)


def die_before_change(number: int) -> None:
    """From now on, count replacements, deletions and flushes, and die just before number `number`."""
    remaining = number

    def dying(change: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            nonlocal remaining
            if remaining == 0:
                os._exit(KILLED)
            remaining -= 1
            return change(*arguments, **options)

        return counted

    os.replace, os.unlink, os.fsync = dying(os.replace), dying(os.unlink), dying(os.fsync)


def publish_alternately(folder: Path, rounds: int) -> None:
    small, large = make_rows(0, 40), make_rows(20, 90)
    for _ in range(rounds):
        publish_reference(folder, small, identity())
        publish_reference(folder, large, identity())


def publish_a_journal_under_a_file_size_limit(root: Path, stop: int, limit: int, outcome: Connection) -> None:
    """Publish the journal at ROOT/journal to ROOT/out; only a hundred rows fit into memory at once."""
    spill.BUFFER_BYTES = 10_000
    keys = KeySet(keys_of(make_rows(0, stop)))
    with Journal(root / "journal") as journal:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            publish_rows(root / "out", keys, [journal], identity(), scratch=root / "scratch")
        except Exception as error:
            outcome.send((type(error).__name__, str(error)))


def die_with_a_spill_folder(scratch: Path) -> None:
    with spill.spill_folder(scratch) as folder:
        (folder / "00000.arrows").write_bytes(b"rows")
        os._exit(KILLED)


def build_a_view_dying_at_the_rename(reference: Path, views: Path) -> None:
    os.replace = lambda *_: os._exit(KILLED)
    open_view(open_reference(reference, expect=None), views)


def read_a_view(reference: Path, views: Path) -> None:
    opened = open_view(open_reference(reference, expect=None), views)
    assert sum(len(keys) for keys, _ in opened.shuffled(7, seed=0)) == len(opened) > 0


def run_as(user: int, target: Callable[..., None], arguments: tuple[Any, ...], outcome: Connection) -> None:
    """Run `target` as another user; report the kind and message of its error, or None."""
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)
    try:
        target(*arguments)
    except Exception as error:
        outcome.send((type(error).__name__, str(error)))
    else:
        outcome.send(None)


def append(folder: Path) -> None:
    with Journal(folder / "journal") as journal:
        journal.append(make_rows(0, BATCH))


def publish_some(folder: Path) -> None:
    publish(folder / "logps", 0, 60)


def compact(folder: Path) -> None:
    compact_journal(folder / "journal", set())
