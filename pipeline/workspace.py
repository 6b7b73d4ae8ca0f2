"""Where work in progress lives: journals, checkpoints, logs. Outside DVC's outputs, which DVC deletes and reverts."""

import os
from pathlib import Path


def workspace() -> Path:
    """$REFCACHE_HOME, else $DVC_ROOT/.refcache, else ./.refcache; absolute. Made by whoever writes there first.

    DVC sets DVC_ROOT for its stages, also for `dvc exp run --temp`, so that a temporary run finds earlier work.
    """
    home = os.environ.get("REFCACHE_HOME")
    return Path(home).absolute() if home else Path(os.environ.get("DVC_ROOT") or ".").absolute() / ".refcache"


def journal_folder() -> Path:
    """Rows scored so far, one folder per reference_id."""
    return workspace() / "journal"


def rescored_folder(reference_id: str) -> Path:
    """The journal of rows that transformers rescored in float32; they take precedence over the engine's."""
    return journal_folder() / reference_id / "rescored"


def sketch_journal_folder() -> Path:
    """Rows sketched so far, one folder per reference_id."""
    return workspace() / "sketch-journal"


def trainer_forward_folder(name: str) -> Path:
    """The journal of what the trainer's own forward gave for sampled rows (drift); safe to delete."""
    return workspace() / "trainer-forward" / name


def answers_folder() -> Path:
    """What policies were asked and answered, one folder per identity; all of it can be asked again."""
    return workspace() / "answers"


def damaged_folder() -> Path:
    """Files that `verify --repair` moved aside, in folders REFERENCE_ID-N."""
    return workspace() / "damaged"


def views_folder() -> Path:
    """Copies of the reference cache for data loaders; each can be made again."""
    return workspace() / "views"


def remote_copies_folder() -> Path:
    """Shards that were fetched from object storage, one folder per publication; each can be fetched again."""
    return workspace() / "remote"


def log_file(name: str) -> Path:
    """The log of one engine, .refcache/logs/NAME.log; its folder exists on return."""
    folder = workspace() / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name}.log"


def tracker_folder(name: str) -> Path:
    """What TensorBoard or Weights & Biases keep of all runs; exists on return."""
    folder = workspace() / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def scratch_folder() -> Path:
    """For files that live as long as one stage; exists on return."""
    folder = workspace() / "tmp"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
