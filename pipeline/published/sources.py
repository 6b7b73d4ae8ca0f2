"""Rows of a dataset on the hub, or of a folder that `datasets` can load."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import RequestError
from pipeline.hub import meet_hub
from pipeline.params import HubParams
from pipeline.published.files import BATCH_ROWS, BadRow, Row, table_rows


class Dataset:
    """One split of a hub dataset, or of a local dataset folder (under `folder` or the working directory).

    Raises RequestError for an unknown dataset, config or split, an unreachable hub, or an empty dataset.
    """

    def __init__(self, params: HubParams, split: str, folder: Path) -> None:
        self._name = f"{params.dataset}:{split}"
        self._dataset = _load_dataset(params, split, folder)

    def count(self) -> int:
        return int(self._dataset.num_rows)

    def rows(self) -> Iterator[Row | BadRow]:
        start = 0
        for table in self._dataset.with_format("arrow").iter(batch_size=BATCH_ROWS):
            yield from table_rows(table, self._name, start)
            start += table.num_rows


def _load_dataset(params: HubParams, split: str, folder: Path) -> Any:
    import sys

    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    # The input folder first: it is the one that DVC watches.
    local = next((path for path in (folder / params.dataset, Path(params.dataset)) if path.is_dir()), None)
    try:
        if local is None:
            meet_hub()
            return datasets.load_dataset(params.dataset, params.config, split=split, revision=params.revision)
        if (local / "dataset_dict.json").exists() or (local / "state.json").exists():
            return _saved_split(datasets.load_from_disk(str(local)), params, split)
        return datasets.load_dataset(str(local), params.config, split=split)
    except (OSError, ValueError, IndexError, datasets.exceptions.DatasetsError) as error:  # IndexError: saved empty
        if isinstance(error, RequestError):
            raise
        raise RequestError(
            f"dataset {params.dataset} (config {params.config}, split {split!r}) could not be loaded: {error}\n"
            "prepare.hub needs the id of a dataset on the hub and a network (or its copy in the Hugging Face cache), "
            f"or a local folder, which is looked for in {folder} and in the working directory; for gated datasets log "
            "in first."
        ) from None


def _saved_split(saved: Any, params: HubParams, split: str) -> Any:
    import datasets

    if not isinstance(saved, datasets.DatasetDict):
        if saved.split is not None and str(saved.split) != split:
            raise RequestError(f"{params.dataset} holds the one split {str(saved.split)!r}, params name {split!r}.")
        return saved
    if split not in saved:
        raise RequestError(f"{params.dataset} has no split {split!r}; it has {', '.join(sorted(saved))}.")
    return saved[split]
