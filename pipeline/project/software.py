"""Is the software there, and does it fit: by what the installed packages say of themselves. Imports none of them."""

import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version

from pipeline.project.check import Check, pip

EXTRAS = {
    "eval": "benchmark tasks of lm-evaluation-harness (evaluate.tasks)",
    "sample": "sample.scorer: math",
    "ray": "phase 1 on several machines (workers: ray)",
    "s3": "dvc push and pull with S3",
    "bench": "TRL, for refcache.trl and the measurements against it",
}
OLDEST_PYTHON = (3, 11)


def software_checks() -> Iterator[Check]:
    yield _python()
    try:
        required = requires("refcache") or []
    except PackageNotFoundError:
        yield Check("refcache", "warning", "runs from its source and is not installed", pip("install", "-e", "."))
        return
    yield Check("refcache", "ok", version("refcache"))
    try:
        from packaging.requirements import Requirement
    except ImportError:
        yield Check("versions", "warning", "can't be compared without `packaging`", pip("install", "packaging"))
        return
    parsed = [Requirement(text) for text in required]
    absent = [str(each) for each in parsed if _applies(each, None) and installed(each.name) is None]
    if absent:
        yield Check("packages", "broken", f"absent: {', '.join(map(_plain, absent))}", pip("install", *absent))
    else:
        yield Check("packages", "ok", "all that refcache always needs are installed")
    yield from _versions(parsed)
    for extra, purpose in EXTRAS.items():
        of_extra = [each for each in parsed if _applies(each, extra) and not _applies(each, None)]
        if not of_extra:
            again = pip("install", "--force-reinstall", "--no-deps", "refcache")
            yield Check(f"extra {extra}", "warning", "unknown to the installed refcache, which is an older one", again)
            continue
        lacking = [each.name for each in of_extra if installed(each.name) is None]
        found = f"absent ({', '.join(lacking)})" if lacking else "installed"
        mend = pip("install", f"refcache[{extra}]") if lacking else None
        yield Check(f"extra {extra}", "ok", f"{found}: {purpose}", mend)


def installed(name: str) -> str | None:
    """The version of a distribution, None where it is absent."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def pinned(extra: str, name: str) -> str | None:
    """What refcache's extra says of a distribution, for example `torch==2.13.0+cpu`; None where it says nothing."""
    try:
        from packaging.requirements import Requirement

        parsed = [Requirement(text) for text in requires("refcache") or []]
    except (ImportError, PackageNotFoundError):
        return None
    named = (f"{each.name}{each.specifier}" for each in parsed if each.name == name and _applies(each, extra))
    return next(named, None)


def _python() -> Check:
    found = sys.version.partition(" ")[0]
    if sys.version_info < OLDEST_PYTHON:
        return Check("python", "broken", f"{found}; refcache needs 3.11 or newer", "python3.11 -m venv .venv")
    if sys.prefix == sys.base_prefix:
        said = f"{found}, outside of a virtual environment: other packages may change what is installed"
        return Check("python", "warning", said, f"{sys.executable} -m venv .venv")
    return Check("python", "ok", f"{found}, {sys.executable}")


def _versions(parsed: list) -> Iterator[Check]:  # type: ignore[type-arg]  # of packaging's Requirement
    """One check of all installed packages that refcache names, extras included but for those of the two engines."""
    unfit = {}
    for each in parsed:
        have = installed(each.name)
        named = _applies(each, None) or any(_applies(each, extra) for extra in EXTRAS)
        if named and have is not None and not each.specifier.contains(have, prereleases=True):
            unfit[f"{each.name}{each.specifier}"] = f"{each.name} {have} (known to fit: {each.specifier})"
    if unfit:
        yield Check("versions", "warning", ", ".join(unfit.values()), pip("install", *unfit))
    else:
        yield Check("versions", "ok", "within what is known to fit")


def _applies(requirement: object, extra: str | None) -> bool:
    marker = getattr(requirement, "marker", None)
    return marker is None or bool(marker.evaluate({"extra": extra or ""}))


def _plain(requirement: str) -> str:
    return requirement.partition(";")[0].strip()
