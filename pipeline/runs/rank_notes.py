"""Which rank ended a run, and how. Launchers report one exit code for all; so every rank leaves notes.

RANKS/N.started   pid and host, when the rank begins
RANKS/N.ended     how it ended, in words; absent for a rank that was killed outright
"""

import json
import os
import socket
from pathlib import Path

from pipeline.files import write_json


class RankNotes:
    """One rank's notes, in a folder that all ranks share."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._ended = folder / f"{rank}.ended"
        write_json(folder / f"{rank}.started", {"pid": os.getpid(), "host": socket.gethostname()})

    def ended(self, how: str, *, at_fault: bool) -> None:
        """at_fault: False for a rank that finished, or that was told to stop."""
        if not self._ended.exists():
            write_json(self._ended, {"how": how, "at_fault": at_fault})


def culprits(folder: Path) -> str:
    """The ranks that ended by themselves, with how; empty if all were well or none had begun.

    A rank that was killed comes before those that failed: their connections broke because of it.
    """
    started = {int(note.stem): json.loads(note.read_text()) for note in folder.glob("*.started")}
    ended = {int(note.stem): note for note in folder.glob("*.ended")}
    killed = [
        f"rank {rank} (process {started[rank]['pid']} on {started[rank]['host']}) was killed"
        for rank in sorted(started.keys() - ended.keys())
    ]
    if killed:
        return ", ".join(killed)
    faults = sorted((note.stat().st_mtime_ns, rank, json.loads(note.read_text())) for rank, note in ended.items())
    return next((f"rank {rank} failed with {note['how']}" for _, rank, note in faults if note["at_fault"]), "")
