"""What `sft` trains on as mapped token ids, shared by all ranks of a machine.

Derived from sft.parquet and named by its content; like the other files in .refcache/views, it can be deleted at any
time (`refcache gc --views`).
"""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy.typing as npt

from cache.derived import build_once
from cache.errors import system_errors
from pipeline.data.tables import iter_sft, scan_sft
from pipeline.tokens.layout import BATCH_ROWS, FILES, IdsWriter
from pipeline.tokens.view import Ints, content_digest, id_slices, lengths_of, mapped, require_built
from pipeline.workspace import views_folder

SUPERVISED_VERSION = 1  # enters the name
SIDES = ("prompt", "response")


class Supervised:
    """The rows of sft.parquet in its order. Ids are read-only views of the mapped files."""

    def __init__(self, path: Path) -> None:
        """path: as `open_supervised` leaves it. Reads no file. Raises RunFailed where something removed it."""
        require_built(path)
        self.path = path
        self._starts, self._ids = (
            [mapped(path / f"{side}_{part}", FILES[f"{side}_{part}"]) for side in SIDES] for part in ("starts", "ids")
        )

    def __len__(self) -> int:
        return len(self._starts[0]) - 1

    def lengths(self, side: int) -> Ints:
        """Tokens of each row's prompt (0) or response (1), (n,); counted when they are asked for."""
        return lengths_of(self._starts[side])

    def sequences(self, rows: npt.NDArray[Any]) -> list[tuple[Ints, Ints]]:
        """Prompt and response of each of `rows`, in the order asked."""
        prompts, responses = (id_slices(ids, starts, rows) for ids, starts in zip(self._ids, self._starts, strict=True))
        return list(zip(prompts, responses, strict=True))


def open_supervised(sft: Path) -> Supervised:
    """The token ids of a file that prepare wrote as sft.parquet; mapped files are made first if need be.

    Reads the file whole for its digest: the stage does this once, and its ranks open `path`. Takes flat memory, and
    disk: 4 bytes a token, 16 a row. Raises RequestError without such a file, CacheError when the system refuses.
    """
    scan_sft(sft)
    with system_errors(f"build token ids of {sft} under {views_folder()}", kept="The prepared rows are intact."):
        path = views_folder() / f"sft-{SUPERVISED_VERSION}-{content_digest(sft)}"
        build_once(path, lambda partial: _write(partial, sft))
        return Supervised(path)


def _write(folder: Path, sft: Path) -> None:
    with ExitStack() as stack:
        names = [f"{side}_{part}" for side in SIDES for part in ("starts", "ids")]
        files = {name: stack.enter_context(open(folder / name, "xb")) for name in names}
        writers = {side: IdsWriter(files[f"{side}_starts"], files[f"{side}_ids"]) for side in SIDES}
        for rows in iter_sft(sft, [f"{side}_ids" for side in SIDES], rows=BATCH_ROWS):
            for side, writer in writers.items():
                writer.add(rows[f"{side}_ids"])
