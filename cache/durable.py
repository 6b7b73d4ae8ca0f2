"""Writing files so that a crash leaves the old or the new content, and never a mixture.

Nothing is edited in place: DVC hard-links its outputs, and a write through a link would change DVC's own copy.
"""

import os
from pathlib import Path

PARTIAL = ".partial"  # suffix of a file that is still being written; never matched by a glob for *.parquet


def partial_of(path: Path) -> Path:
    """Where to write what will become `path`; a leftover of a killed run is removed, since it may be a hard link."""
    partial = path.with_name(path.name + PARTIAL)
    partial.unlink(missing_ok=True)
    return partial


def write_durably(path: Path, data: bytes) -> None:
    """Replace `path` by `data`; after the return it survives a power cut."""
    partial = partial_of(path)
    try:
        with open(partial, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Make renames and deletions inside `folder` survive a power cut."""
    sync_file(folder)
