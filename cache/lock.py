"""The right to write, held by one process at a time and released by the system when that process dies."""

import fcntl
import os
import socket
from pathlib import Path

from cache.errors import CacheLocked

LOCKS = Path("/proc/locks")  # every lock that the kernel knows, with its holder's pid


def acquire(path: Path) -> int:
    """Lock the file `path` for this process and return the descriptor that holds the lock.

    Raises CacheLocked with the holder's pid and host. The file is never deleted: a waiter would lock a ghost.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 500, 0).decode(errors="replace").strip() or "an unnamed process"
        os.close(descriptor)
        raise CacheLocked(
            f"{path.parent} is being written by {holder}. A second writer would repeat its work. "
            "Wait for it, or end that process (a killed `dvc` can leave its stage running) and run again."
        ) from None
    except OSError:
        os.close(descriptor)
        raise
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"pid {os.getpid()} on host {socket.gethostname()}\n".encode(), 0)
    _held.add(descriptor)
    return descriptor


def release(descriptor: int) -> None:
    """Give the lock up; without effect in a forked child, which never had it."""
    if descriptor in _held:
        _held.discard(descriptor)
        os.close(descriptor)


def holder_of(descriptor: int) -> str:
    """Who holds the lock that this descriptor could not get: "pid N on host H" as far as the system says.

    For a lock on a folder, where the holder cannot leave its name in the file.
    """
    try:
        lines = LOCKS.read_text().splitlines()
    except OSError:  # not Linux
        return "another process"
    status = os.fstat(descriptor)
    file = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    # "1: FLOCK  ADVISORY  WRITE 4711 fe:00:260072 0 EOF"; those that wait have "->" before FLOCK.
    fields = (line.split() for line in lines)
    pids = [found[4] for found in fields if len(found) > 5 and found[1] == "FLOCK" and found[5] == file]
    # 0 or less: a process in another container.
    return f"pid {pids[0]} on host {socket.gethostname()}" if pids and int(pids[0]) > 0 else "another process"


_held: set[int] = set()


def _drop_in_child() -> None:
    # A forked child shares the lock: an engine worker that outlives its killed scorer would keep everyone else out.
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_drop_in_child)
