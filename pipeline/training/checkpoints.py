"""Checkpoints on disk: sealing, finding what is sound, dropping what is not. No engine, so the stage can look first.

    FOLDER/step-00000060/           what the engine wrote, and the histories up to that step
    FOLDER/step-00000060.complete   the marker, written last: size and digest of every file above

A kill while saving leaves a folder without a marker. A file that was damaged later, or never reached the disk before
the machine went down, no longer matches its marker.
"""

import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cache.durable import sync_folder, write_durably


def place(folder: Path, step: int) -> Path:
    """Where the files of `step` lie."""
    return folder / f"step-{step:08d}"


def complete_checkpoints(folder: Path) -> list[int]:
    """Steps whose checkpoint has its marker, oldest first."""
    return sorted(int(marker.stem.removeprefix("step-")) for marker in folder.glob("step-*.complete"))


def seal(folder: Path, step: int) -> None:
    """Flush the files of `step` to the disk and write its marker: from here on the checkpoint counts."""
    files = _files(place(folder, step))
    with ThreadPoolExecutor() as threads:  # hashing and flushing release the GIL
        described = dict(zip(files, threads.map(_flushed, files.values()), strict=True))
    for inner in {file.parent for file in files.values()} | {place(folder, step)}:
        sync_folder(inner)
    write_durably(_marker(folder, step), json.dumps({"files": described}, indent=1).encode())


def drop_unsound(folder: Path) -> list[str]:
    """Remove what a kill left unfinished, and checkpoints from the newest back to the first sound one.

    Returns a sentence for every checkpoint that had its marker and still was no good.
    """
    found = []
    for step in reversed(complete_checkpoints(folder)):
        fault = fault_of(folder, step)
        if fault is None:
            break
        found.append(f"The checkpoint of step {step} is damaged ({fault}); it is dropped for the one before.")
        remove(folder, step)
    sealed = {place(folder, step).name for step in complete_checkpoints(folder)}
    for leftover in folder.glob("step-*"):
        if leftover.is_dir() and leftover.name not in sealed:
            shutil.rmtree(leftover)
    return found


def fault_of(folder: Path, step: int) -> str | None:
    """What is wrong with a checkpoint, in words; None for one whose files are as its marker says."""
    root = place(folder, step)
    try:
        expected: dict[str, list[object]] = json.loads(_marker(folder, step).read_text())["files"]
    except (ValueError, KeyError, TypeError):
        return f"{_marker(folder, step).name} lists no files"
    with ThreadPoolExecutor() as threads:
        faults = threads.map(lambda item: _fault(root / item[0], *item[1]), expected.items())
        return next(filter(None, faults), None)


def remove(folder: Path, step: int) -> None:
    """The marker first, so that a kill in between leaves nothing that looks complete."""
    _marker(folder, step).unlink(missing_ok=True)
    shutil.rmtree(place(folder, step), ignore_errors=True)


def prune(folder: Path, keep: int) -> None:
    """Keep the newest `keep` complete checkpoints."""
    for step in complete_checkpoints(folder)[:-keep]:
        remove(folder, step)


def _marker(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}.complete"


def _files(root: Path) -> dict[str, Path]:
    return {file.relative_to(root).as_posix(): file for file in sorted(root.rglob("*")) if file.is_file()}


def _flushed(file: Path) -> list[object]:
    with file.open("rb") as content:
        os.fsync(content.fileno())
        return [os.fstat(content.fileno()).st_size, hashlib.file_digest(content, "blake2b").hexdigest()]


def _fault(file: Path, size: object, digest: object) -> str | None:
    if not file.is_file():
        return f"{file.name} is missing"
    if file.stat().st_size != size:
        return f"{file.name} has {file.stat().st_size} bytes, its marker says {size}"
    with file.open("rb") as content:
        if hashlib.file_digest(content, "blake2b").hexdigest() != digest:
            return f"the content of {file.name} is not what its marker says"
    return None
