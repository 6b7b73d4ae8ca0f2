"""Responses and prompts as uncompressed token ids in mapped files: random rows, each prompt once, one copy a machine.

Parquet is decoded a row group at a time and into each process's own memory. The view holds the same ids as plain
arrays, whose pages all processes share; it is derived from one responses.parquet, named by the digest of its bytes, and
can be deleted at any time (`refcache gc --views`).
"""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cache import Keys, KeySet
from cache.derived import build_once, is_whole
from cache.errors import system_errors
from cache.key_set import KeyArray, key_array
from pipeline.errors import RunFailed
from pipeline.tokens.layout import FILES, KEY_ORDER, VIEW_VERSION, write_view
from pipeline.workspace import views_folder

Ints = npt.NDArray[np.int32]


class Sequences(NamedTuple):
    """Token ids of some responses and of their prompts, int32, one array each; read-only views of the mapped files."""

    prompts: list[Ints]
    responses: list[Ints]


def open_token_view(pairs: Path) -> "TokenView":
    """The view of PAIRS/responses.parquet in .refcache/views; built first if it is not there or not whole.

    Reads the whole file for its digest: a stage does this once, and its ranks open `path` (TokenView). Building takes
    flat memory, and disk: 4 bytes a token, 37 a response, 24 a prompt. Of several processes one builds, and the others
    wait. Raises RequestError without such a file, CacheError when the system refuses.
    """
    with system_errors(f"build token ids of {pairs} under {views_folder()}", kept="The prepared tables are intact."):
        path = views_folder() / token_view_name(pairs / "responses.parquet")
        build_once(path, lambda partial: write_view(partial, pairs))
        return TokenView(path)


def token_view_name(responses: Path) -> str:
    """The folder's name: what the layout is and a digest of the table's bytes."""
    if not responses.exists():
        return "tokens-absent"  # reading it says what to run
    return f"tokens-{VIEW_VERSION}-{content_digest(responses)}"


def content_digest(table: Path) -> str:
    """Of a file's bytes, for the names of what is derived from it."""
    with table.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16, person=b"refcache")).hexdigest()


class TokenView:
    """The responses of a prepared folder in file order, and their distinct prompts in order of first appearance.

    keys, prompt_keys: (n,) and (prompts,) of dtype S16, whose single items lose zeros at their end (cache/key_set.py:
    key_bytes). prompt_numbers: (n,) int32, of each response's prompt. train: (n,) bool, whether its split is "train".
    flat_responses, flat_prompts: all their ids, int32; those of response i begin at response_starts[i] and end at
    response_starts[i + 1], (n + 1,), those of prompt number i likewise. All arrays are read-only, and mapped but for
    the lengths, which are counted when they are asked for.
    """

    def __init__(self, path: Path) -> None:
        """path: of a view that exists, as `open_token_view` leaves it. Reads no file, so it takes no time."""
        require_built(path)
        self.path = path
        arrays = {name: mapped(path / name, dtype) for name, dtype in FILES.items()}
        self.keys: KeyArray = arrays["response_keys"]
        self.prompt_keys: KeyArray = arrays["prompt_keys"]
        self.prompt_numbers: Ints = arrays["prompt_numbers"]
        self.train: npt.NDArray[np.bool_] = arrays["train"]
        self.flat_responses, self.response_starts = arrays["response_ids"], arrays["response_starts"]
        self.flat_prompts, self.prompt_starts = arrays["prompt_ids"], arrays["prompt_starts"]
        self._key_order = mapped(path / KEY_ORDER, np.int64) if (path / KEY_ORDER).exists() else None

    def __len__(self) -> int:
        return len(self.keys)

    def response_ids(self, row: int) -> Ints:
        return self.flat_responses[self.response_starts[row] : self.response_starts[row + 1]]

    def prompt_ids(self, row: int) -> Ints:
        """Of the prompt of response `row`."""
        number = self.prompt_numbers[row]
        return self.flat_prompts[self.prompt_starts[number] : self.prompt_starts[number + 1]]

    def gather(self, rows: npt.NDArray[Any]) -> Sequences:
        """In the order asked, and as often."""
        numbers = self.prompt_numbers[rows]
        prompts = id_slices(self.flat_prompts, self.prompt_starts, numbers)
        return Sequences(prompts, id_slices(self.flat_responses, self.response_starts, rows))

    @property
    def response_lengths(self) -> Ints:
        """Tokens of each response, (n,)."""
        return lengths_of(self.response_starts)

    @property
    def prompt_lengths(self) -> Ints:
        """Tokens of each response's prompt, (n,)."""
        return lengths_of(self.prompt_starts)[self.prompt_numbers]

    def rows_of(self, keys: Keys) -> npt.NDArray[np.int64]:
        """At which row each of `keys` stands, (len(keys),); -1 where it does not."""
        asked = key_array(keys)
        if self._key_order is None:
            return KeySet.from_sorted(self.keys).positions(asked)
        if not len(self):
            return np.full(len(asked), -1)
        found = np.minimum(self.keys.searchsorted(asked, sorter=self._key_order), len(self) - 1)
        rows: npt.NDArray[np.int64] = self._key_order[found]
        return np.where(self.keys[rows] == asked, rows, -1)


def require_built(path: Path) -> None:
    """RunFailed unless what a stage left at `path`, for processes that only read it, is there and whole."""
    if not is_whole(path):
        raise RunFailed(
            f"{path} is not there or not whole: something removed what was about to be read (`refcache gc --views`). "
            "Run the same command again, which makes it anew."
        )


def mapped(path: Path, dtype: Any) -> npt.NDArray[Any]:
    """A file of numbers, read-only."""
    # An empty file cannot be mapped. Plain arrays, because slices of np.memmap take several times as long.
    return np.asarray(np.memmap(path, dtype, mode="r")) if path.stat().st_size else np.empty(0, dtype)


def id_slices(values: Ints, starts: npt.NDArray[np.int64], numbers: npt.NDArray[Any]) -> list[Ints]:
    """Of flat ids those of each of `numbers`, without a copy."""
    bounds = zip(starts[numbers].tolist(), starts[numbers + 1].tolist(), strict=True)
    return [values[start:stop] for start, stop in bounds]


def lengths_of(starts: npt.NDArray[np.int64]) -> Ints:
    """How many ids lie between each start and the next, (len(starts) - 1,)."""
    lengths = np.empty(len(starts) - 1, np.int32)
    np.subtract(starts[1:], starts[:-1], out=lengths, casting="unsafe")
    return lengths
