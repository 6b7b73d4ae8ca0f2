"""Compilers, commands, disk and shared memory."""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from pipeline.project.check import Check
from pipeline.workspace import workspace

GIB = 1 << 30
LITTLE_DISK, TOO_LITTLE_DISK, LITTLE_SHARED = 10 * GIB, GIB, GIB


def machine_checks(folder: Path) -> Iterator[Check]:
    yield _program("g++", "torch and vLLM compile kernels with it", "apt install g++")
    yield _program("git", "DVC needs it", "apt install git")
    yield _commands()
    places = {"disk": folder, "disk of .refcache": workspace()}
    devices = {_existing(place).stat().st_dev for place in places.values()}
    for name, place in list(places.items())[: len(devices)]:
        yield _disk(name, _existing(place))
    yield _shared_memory(Path("/dev/shm"))


def _program(name: str, purpose: str, mend: str) -> Check:
    place = shutil.which(name)
    return Check(name, "ok", place) if place else Check(name, "broken", f"not found; {purpose}", mend)


def _commands() -> Check:
    """DVC starts `refcache` by name, people start `dvc`, and DeepSpeed starts `ninja`."""
    scripts = Path(sys.prefix) / "bin"
    found = {name: shutil.which(name) for name in ("refcache", "dvc", "ninja")}
    absent = [name for name in found if found[name] is None]
    foreign = [place for place in found.values() if place and Path(place).parent.resolve() != scripts.resolve()]
    activate = f". {scripts}/activate"
    if absent:
        said = f"PATH has no {' and no '.join(absent)}, which DVC and DeepSpeed start by name"
        return Check("commands", "broken", said, f"{activate} && python -m pip install dvc ninja")
    if foreign:
        said = f"PATH names {', '.join(foreign)}, and this Python is {sys.executable}: two installations"
        return Check("commands", "warning", said, activate)
    return Check("commands", "ok", f"refcache, dvc and ninja are those of {scripts}")


def _existing(place: Path) -> Path:
    return next(path for path in [place.resolve(), *place.resolve().parents] if path.exists())


def _disk(name: str, place: Path) -> Check:
    free = shutil.disk_usage(place).free
    said = f"{free / GIB:.0f} GiB free at {place}"
    if free >= LITTLE_DISK:
        return Check(name, "ok", said)
    mend = "export REFCACHE_HOME=/a/larger/disk/.refcache" if ".refcache" in name else "refcache gc --views"
    return Check(name, "broken" if free < TOO_LITTLE_DISK else "warning", said, mend)


def _shared_memory(place: Path) -> Check:
    if not place.is_dir():
        return Check("shared memory", "warning", f"no {place}; several ranks or engines can't talk through it")
    size = shutil.disk_usage(place).total
    said = f"{size / GIB:.1f} GiB at {place}"
    if size < LITTLE_SHARED:
        mend = f"mount -o remount,size=8G {place}    (in Docker: docker run --shm-size=8g ...)"
        return Check("shared memory", "warning", f"{said}: little for several ranks, tensor parallelism or Ray", mend)
    return Check("shared memory", "ok", said)
