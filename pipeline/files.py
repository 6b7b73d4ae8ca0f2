"""Files that are written whole: whoever reads meanwhile, or after a kill, finds the old content or the new."""

import json
import os
from pathlib import Path
from typing import Any


def write_json(path: Path, content: Any, *, indent: int = 1) -> None:
    """Replace `path` by `content` as JSON and a line break; the folder is made."""
    write_text(path, json.dumps(content, indent=indent, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` in UTF-8; the folder is made.

    A new file and a rename, never an edit in place: the old one may be a hard link into DVC's own store.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.partial")  # several ranks may write the same file at once
    try:
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
