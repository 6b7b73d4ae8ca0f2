"""Log-probs of token sequences out of a published reference cache, by content, or the reason why they are not there.

Nothing is computed here: what the cache does not hold is an error, since whoever asks has no reference model in memory.
"""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cache import CacheIncomplete, open_reference, open_view, prompt_key, response_key
from cache.key_set import KeyArray, key_array
from cache.keys import TokenIds
from pipeline.workspace import views_folder

SHOWN_TOKENS = 12

Decode = Callable[[list[int]], str]


class ReferenceLookup:
    """Token log-probs under the reference that the folder `path` was published for, by the tokens themselves.

    Reads from a memory-mapped copy in `views` (None: .refcache/views), which is made at the first opening and which all
    processes of a machine share. Raises what `cache.open_reference` raises.
    """

    def __init__(self, path: Path | str, *, views: Path | None = None, decode: Decode | None = None) -> None:
        """decode: token ids to text, for messages; None: they show ids."""
        self.reference = open_reference(path, expect=None)
        self._view = open_view(self.reference, views or views_folder())
        self._decode = decode

    def token_logps(self, prompt_ids: TokenIds, response_ids: TokenIds) -> npt.NDArray[np.float32]:
        """log p(token | all before it) of each response token, nats, (response length,) float32.

        A response that was cut shorter than when it was scored is answered too: its tokens saw the same ones before
        them. Raises CacheIncomplete, with what the cache has instead, where no row begins with these tokens.
        """
        response = np.asarray(response_ids, np.int32)
        position = self._view.keys.positions(key_array([response_key(prompt_ids, response)]))
        if position[0] >= 0:
            return self._view.rows_at(position).token_logps[0]
        stored = self._view.rows_at(self._answers_to(prompt_key(prompt_ids)))
        for ids, logps in zip(stored.token_ids, stored.token_logps, strict=True):
            if len(ids) > len(response) and np.array_equal(ids[: len(response)], response):
                return logps[: len(response)]
        raise CacheIncomplete(self._why_absent(np.asarray(prompt_ids, np.int32), response, stored.token_ids))

    def _answers_to(self, prompt: bytes) -> npt.NDArray[np.int64]:
        """Positions of the rows of a prompt."""
        prompts, order = self._by_prompt
        wanted = key_array([prompt])
        first, last = (int(prompts.searchsorted(wanted, side)[0]) for side in ("left", "right"))
        return order[first:last]

    @cached_property
    def _by_prompt(self) -> tuple[KeyArray, npt.NDArray[np.int64]]:
        """Prompt keys in ascending order and the positions of their rows; 24 bytes a row, made when first needed."""
        columns = [key_array(rows["prompt_key"]) for rows in self.reference.tables(["prompt_key"])]
        keys = np.concatenate([key_array(()), *columns])
        order = np.argsort(keys, kind="stable")
        return keys[order], order

    def _why_absent(self, prompt: npt.NDArray[np.int32], response: npt.NDArray[np.int32], stored: list[Any]) -> str:
        found = f"{self.reference.path} has no row for a response of {len(response)} tokens"
        if not stored:
            return (
                f"{found}, nor any other response to its prompt of {len(prompt)} tokens, which ends with "
                f"{self._shown(prompt[-SHOWN_TOKENS:])}. The prompt was rendered by another chat template or "
                "tokenizer, or cut to another length (a prompt that lost its beginning is another prompt), or comes "
                "from other data."
            )
        shared = [_shared(ids, response) for ids in stored]
        closest = stored[int(np.argmax(shared))]
        if max(shared) == len(closest):
            return (
                f"{found}; it has the first {len(closest)} of them, without {self._shown(response[len(closest) :])} at "
                "the end. Responses were scored up to their end-of-turn token, and cut at prepare.max_tokens: what a "
                "chat template writes after the end of a turn has to be left out here."
            )
        return (
            f"{found}; of the {len(stored)} that it has for this prompt, the closest shares {max(shared)} tokens and "
            f"goes on with {self._shown(closest[max(shared) :][:SHOWN_TOKENS])} instead of "
            f"{self._shown(response[max(shared) :][:SHOWN_TOKENS])}. Score it: add the pair to what `refcache prepare` "
            "reads."
        )

    def _shown(self, ids: npt.NDArray[np.int32]) -> str:
        listed = ids.tolist()
        return repr(self._decode(listed)) if self._decode else str(listed)


def _shared(ids: npt.NDArray[np.int32], others: npt.NDArray[np.int32]) -> int:
    """Tokens at the beginning of both."""
    length = min(len(ids), len(others))
    differs = np.flatnonzero(ids[:length] != others[:length])
    return int(differs[0]) if len(differs) else length
