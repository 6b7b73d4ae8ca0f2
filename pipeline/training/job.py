"""What a training run is told: the content of its job file."""

from dataclasses import dataclass, field
from typing import Any

# Files of a run's work folder through which the stage and its ranks speak.
JOB, SUMMARY, ERROR, HEARTBEAT = "job.json", "summary.json", "error.json", "heartbeat"


@dataclass(frozen=True, kw_only=True)
class Job:
    """What the ranks do, as the job file carries it. `loop` is a LoopParams dump; `settings` is the task's own."""

    kind: str  # "sft" or "preferences"
    title: str  # what people call this run
    paths: dict[str, str]
    loop: dict[str, Any]
    settings: dict[str, Any]
    seed: int
    log_to: tuple[str, ...] = ()  # trackers
    examples: dict[str, Any] = field(default_factory=dict)  # of preferences: tokens.examples.Places by split
