"""Write input files and run `prepare_data` on them, for the tests of prepare."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline.data.prepare import prepare_data
from pipeline.params import ModelParams, PrepareParams

SCRATCH = ModelParams.model_validate({"scratch": {"vocabulary_size": 300}})


def write_jsonl(path: Path, rows: Iterable[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def pair_rows(count: int, start: int = 0) -> list[dict[str, str]]:
    """Distinct prompts, one good pair each."""
    return [
        {"prompt": f"What follows {n}?", "chosen": f"It is {n + 1}.", "rejected": f"{n + 2}, I think."}
        for n in range(start, start + count)
    ]


def sft_rows(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"What is before {n}?", "completion": f"It is {n - 1}."} for n in range(count)]


def file_params(folder: Path, **changes: Any) -> PrepareParams:
    """Parameters for folder/pairs.jsonl and folder/sft.jsonl."""
    values: dict[str, Any] = {
        "source": "files",
        "input": str(folder),
        "files": {"pairs": ["pairs.jsonl"]},
        "sft": {"source": "files", "files": ["sft.jsonl"]},
        "test_share": 0.3,
    }
    return PrepareParams.model_validate(values | changes)


def prepare_into(out: Path, params: PrepareParams, model: ModelParams = SCRATCH, **options: Any) -> dict[str, Any]:
    paths = {"sft": out / "sft.parquet", "tokenizer": out / "tokenizer", "pairs": out / "pairs"}
    return prepare_data(params, model, **paths, summary=out / "summary.json", **options)


def digests(folder: Path) -> dict[str, str]:
    """Every file below `folder` with the digest of its bytes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
