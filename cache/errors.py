"""What can be wrong with a reference cache.

CacheError
├── CacheMismatch    it holds the answers of another reference, or of another format version    (exit code 2)
├── CacheIncomplete  there is no published cache here, or it lacks rows that were asked for      (exit code 2)
├── CacheCorrupt     files are missing, damaged or foreign                                       (exit code 1)
└── CacheLocked      another process is writing                                                  (exit code 1)

CacheError itself is raised for what the system refuses: disk full, no permission, read-only (exit code 1).
"""

from collections.abc import Iterator
from contextlib import contextmanager


class CacheError(RuntimeError):
    """The reference cache cannot be read or written; the message says what was found and what to run."""


class CacheMismatch(CacheError):
    """The cache holds the answers of another reference model, or was written by a newer format."""


class CacheIncomplete(CacheError):
    """The cache was never published, or it lacks rows that were asked for."""


class CacheCorrupt(CacheError):
    """A file is missing, damaged, or does not belong there."""


class CacheLocked(CacheError):
    """Another process holds the right to write."""


@contextmanager
def system_errors(doing: str, *, kept: str) -> Iterator[None]:
    """Turn the system's refusals (disk full, permission, quota) into a CacheError.

    doing: what was attempted ("append to FILE"); kept: what is still intact, and so what the user may rely on.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise CacheError(
            f"Cannot {doing}: {reason}. {kept} Remove the cause and run the same command again."
        ) from error
