"""Folders of files that are derived from others, mapped by readers, and can be made again whenever they are missing.

A folder is built beside its place and renamed whole; of several processes one builds, and the others wait.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cache.durable import PARTIAL, sync_file, sync_folder

SIZES = "sizes.json"  # {name: bytes} of the other files


def build_once(path: Path, build: Callable[[Path], None]) -> None:
    """Unless `path` is there and whole, have `build` write its files into an empty folder, which takes that place.

    Raises OSError where the system refuses, and what `build` raises; then nothing is left behind.
    """
    if not is_whole(path):
        with sole_builder(path.parent):
            if not is_whole(path):
                _build(path, build)


def is_whole(path: Path) -> bool:
    """It was renamed into place whole, so this asks for what happens to files later, as when a copy stops half-way."""
    try:
        sizes = json.loads((path / SIZES).read_bytes())
        return bool(sizes and sizes == {name: (path / name).stat().st_size for name in sizes})
    except (FileNotFoundError, NotADirectoryError, ValueError, AttributeError, TypeError):
        return False


def _build(path: Path, build: Callable[[Path], None]) -> None:
    partial = path.with_name(path.name + PARTIAL)
    for leftover in (partial, path):  # of a killed process, and what is not whole
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir()
    try:
        build(partial)
        files = sorted(partial.iterdir())
        (partial / SIZES).write_text(json.dumps({file.name: file.stat().st_size for file in files}))
        for file in (*files, partial / SIZES):
            sync_file(file)
        os.replace(partial, path)
        sync_folder(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def sole_builder(folder: Path) -> Iterator[None]:
    """Wait for whoever builds or removes in `folder`, made if need be; the system ends the wait when they die."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
