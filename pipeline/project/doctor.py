"""`refcache doctor`: all checks, none of which may end the others."""

from collections.abc import Iterator
from pathlib import Path

from pipeline.project.check import Check
from pipeline.project.engines import engine_checks
from pipeline.project.machine import machine_checks
from pipeline.project.place import place_checks
from pipeline.project.software import software_checks


def examine(folder: Path, *, ask_hub: bool = False) -> Iterator[Check]:
    """The checks of this machine and of the project in `folder`, each as soon as it is known.

    Imports no package that may be absent or broken; torch and vLLM are asked in a process of their own.
    ask_hub: also see whether the Hugging Face hub answers.
    """
    groups = {
        "software": software_checks(),
        "engines": engine_checks(),
        "machine": machine_checks(folder),
        "project": place_checks(folder.resolve(), ask_hub=ask_hub),
    }
    for name, checks in groups.items():
        try:
            yield from checks
        except Exception as error:  # a doctor that falls ill says so and goes on
            yield Check(name, "warning", f"could not be looked at any further: {type(error).__name__}: {error}")
