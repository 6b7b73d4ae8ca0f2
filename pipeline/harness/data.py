"""Where a task's items come from: files in evaluate.task_data, else the dataset that the task names."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import RequestError

_BUILDERS = {"jsonl": "json", "json": "json", "parquet": "parquet"}  # of the datasets library, by the files' ending
_EVALUATED, _OTHER = ("test_split", "validation_split"), ("fewshot_split", "training_split", "validation_split")


def local_data(folder: Path, names: Sequence[str], config: Mapping[str, Any], shots: int) -> dict[str, Any]:
    """What replaces a task's dataset, or nothing where the folder has no data of it.

    names: of the task, then of what it belongs to; the first with files counts. shots: examples before a question.
    Files: NAME.jsonl for every split, or NAME/SPLIT.jsonl, or .parquet. Raises RequestError for a split that is needed
    and has no file.
    """
    if not folder.is_dir():
        raise RequestError(f"evaluate.task_data is {folder}, which is no folder. Name the one with the tasks' files.")
    splits = {key: config[key] for key in (*_EVALUATED, *_OTHER) if config.get(key)}
    if inner := (config.get("fewshot_config") or {}).get("split"):
        splits["fewshot_config"] = inner
    for name in names:
        for ending, builder in _BUILDERS.items():
            whole = folder / f"{name}.{ending}"
            if whole.is_file():
                return _replaced(builder, dict.fromkeys(splits.values(), whole))
            found = {
                split: file for split in splits.values() if (file := folder / name / f"{split}.{ending}").is_file()
            }
            if found:
                missing = {key: split for key, split in splits.items() if split not in found}
                if lacking := sorted({split for key, split in missing.items() if key in _needed(splits, shots)}):
                    expected = ", ".join(str(folder / name / f"{split}.{ending}") for split in lacking)
                    raise RequestError(
                        f"evaluate.task_data has {', '.join(str(file) for file in found.values())} for the task "
                        f"{names[0]}, which with {shots} examples before a question also needs {expected}. Add that "
                        "file, or set evaluate.fewshot to 0 where it is for the examples."
                    )
                return _replaced(builder, found) | dict.fromkeys(missing)
    return {}


def _needed(splits: Mapping[str, str], shots: int) -> set[str]:
    """Of the keys of splits: the evaluated one, and where the examples come from."""
    evaluated = next((key for key in _EVALUATED if key in splits), None)
    source = next((key for key in ("fewshot_config", *_OTHER) if key in splits), None)
    always = {evaluated} | ({"fewshot_config"} & splits.keys())  # the harness opens that one whether or not it is used
    return {key for key in (always | {source} if shots else always) if key is not None}


def _replaced(builder: str, files: Mapping[str, Path]) -> dict[str, Any]:
    if empty := sorted(str(file) for file in set(files.values()) if not file.stat().st_size):
        raise RequestError(
            f"evaluate.task_data has {', '.join(empty)}, which is empty. Expected are the task's items in the columns "
            "of its own dataset, as JSON lines or Parquet."
        )
    return {
        "dataset_path": builder,
        "dataset_name": None,
        "custom_dataset": None,
        "dataset_kwargs": {"data_files": {split: str(file.absolute()) for split, file in files.items()}},
    }


def is_local(config: Mapping[str, Any]) -> bool:
    """Whether a task's own dataset is made of files: no hub has to be asked."""
    path = config.get("dataset_path")
    return path is None or path in {"json", "parquet", "csv", "text", "arrow"} or Path(path).exists()
