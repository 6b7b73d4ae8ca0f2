"""Log-probs of token sequences out of a published reference cache, by content, or the reason why they are not there.

Nothing is computed here: what the cache does not hold is an error, since whoever asks has no reference model in memory.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cache import CacheIncomplete, CacheMismatch, Reference, open_reference, open_view, prompt_key, response_key
from cache.key_set import KeyArray, key_array
from cache.keys import TokenIds
from cache.view import ViewRows
from pipeline.workspace import views_folder

SHOWN_TOKENS = 12

Decode = Callable[[list[int]], str]
Paths = Path | str | Sequence[Path | str]


class ReferenceLookup:
    """Token log-probs under one reference, by the tokens themselves, out of the folders that were published for it.

    Reads from memory-mapped copies in `views` (None: .refcache/views), which are made at the first opening and which
    all processes of a machine share.
    """

    def __init__(self, paths: Paths, *, views: Path | None = None, decode: Decode | None = None) -> None:
        """decode: token ids to text, for messages; None: they show ids.

        Raises what `cache.open_reference` raises, CacheMismatch where folders belong to different references, and
        ValueError for no folder.
        """
        listed = [paths] if isinstance(paths, str | Path) else list(paths or ())
        if not listed:
            raise ValueError("No reference cache was given; name at least one folder that `refcache score` published.")
        self.references = [open_reference(path, expect=None) for path in listed]
        self._require_one_reference()
        self._stores = [_Store(reference, views or views_folder()) for reference in self.references]
        self.decode = decode

    @property
    def reference_id(self) -> str:
        return self.references[0].identity.reference_id

    @property
    def dtype(self) -> str:
        """What the reference was computed in, for example "bfloat16"."""
        return self.references[0].identity.dtype

    @property
    def places(self) -> str:
        """Where the rows are looked for, for messages."""
        return ", ".join(str(reference.place) for reference in self.references)

    def token_logps(self, prompt_ids: TokenIds, response_ids: TokenIds) -> npt.NDArray[np.float32]:
        """log p(token | all before it) of each response token, nats, (response length,) float32.

        A response that was cut shorter than when it was scored is answered too: its tokens saw the same ones before
        them. Raises CacheIncomplete, with what the cache has instead, where no row begins with these tokens, and
        ValueError for ids that are no int32 >= 0.
        """
        key = key_array([response_key(prompt_ids, response_ids)])  # refuses what int32 would cut or wrap
        response = np.asarray(response_ids, np.int32)
        for store in self._stores:
            found = store.exact(key)
            if found is not None:
                return found
        prompt = key_array([prompt_key(prompt_ids)])
        answers = [store.answers_to(prompt) for store in self._stores]
        for stored in answers:
            for ids, logps in zip(stored.token_ids, stored.token_logps, strict=True):
                if len(ids) > len(response) and np.array_equal(ids[: len(response)], response):
                    return logps[: len(response)]
        others = [ids for stored in answers for ids in stored.token_ids]
        raise CacheIncomplete(self._why_absent(np.asarray(prompt_ids, np.int32), response, others))

    def _require_one_reference(self) -> None:
        first, *others = self.references
        for other in others:
            if differences := first.identity.differences(other.identity):
                raise CacheMismatch(
                    f"{first.place} and {other.place} hold log-probs of two references: {', '.join(differences)} "
                    "differ. Values of one can't stand beside those of the other; name folders of one reference."
                )

    def _why_absent(self, prompt: npt.NDArray[np.int32], response: npt.NDArray[np.int32], stored: list[Any]) -> str:
        found = f"{self.places} has no row for a response of {len(response)} tokens"
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
                "the end. Responses were scored up to their end-of-turn token, unless prepare.after_end is keep, which "
                "keeps what a chat template writes behind it (ChatML a line break), and they were cut at "
                "prepare.max_tokens. Prepare and score with the setting that fits."
            )
        return (
            f"{found}; of the {len(stored)} that it has for this prompt, the closest shares {max(shared)} tokens and "
            f"goes on with {self._shown(closest[max(shared) :][:SHOWN_TOKENS])} instead of "
            f"{self._shown(response[max(shared) :][:SHOWN_TOKENS])}. Score it: add the pair to what `refcache prepare` "
            "reads."
        )

    def _shown(self, ids: npt.NDArray[np.int32]) -> str:
        listed = ids.tolist()
        return repr(self.decode(listed)) if self.decode else str(listed)


class _Store:
    """One published folder."""

    def __init__(self, reference: Reference, views: Path) -> None:
        self._reference, self._view = reference, open_view(reference, views)

    def exact(self, key: KeyArray) -> npt.NDArray[np.float32] | None:
        """The token log-probs of a response, (length,); None where it has none. key: one, (1,)."""
        position = self._view.keys.positions(key)
        return self._view.rows_at(position).token_logps[0] if position[0] >= 0 else None

    def answers_to(self, prompt: KeyArray) -> ViewRows:
        """The rows of a prompt. prompt: its key, (1,)."""
        prompts, order = self._by_prompt
        first, last = (int(prompts.searchsorted(prompt, side)[0]) for side in ("left", "right"))
        return self._view.rows_at(order[first:last])

    @cached_property
    def _by_prompt(self) -> tuple[KeyArray, npt.NDArray[np.int64]]:
        """Prompt keys in ascending order and the positions of their rows; 24 bytes a row, made when first needed."""
        columns = [key_array(rows["prompt_key"]) for rows in self._reference.tables(["prompt_key"])]
        keys = np.concatenate([key_array(()), *columns])
        order = np.argsort(keys, kind="stable")
        return keys[order], order


def _shared(ids: npt.NDArray[np.int32], others: npt.NDArray[np.int32]) -> int:
    """Tokens at the beginning of both."""
    length = min(len(ids), len(others))
    differs = np.flatnonzero(ids[:length] != others[:length])
    return int(differs[0]) if len(differs) else length
