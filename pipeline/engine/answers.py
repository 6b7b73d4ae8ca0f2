"""Several responses under one prompt in one engine: what the engine computed once is read once, and checked.

With prefix caching vLLM skips the blocks of a sequence that an earlier one has filled, and then has no answer for the
skipped positions. Which those are is read off the answer itself, never computed from block sizes. A skipped response
token (two responses began alike) is taken from the response that computed it; whatever stays open is scored alone.
"""

import hashlib
from collections.abc import Sequence
from itertools import groupby
from typing import Protocol

import numpy as np

from pipeline.engine.rows import Row


def prompt_salt(prompt: np.ndarray) -> str:
    """vLLM's cache_salt for a prompt: only sequences under the very same prompt may share blocks."""
    return hashlib.blake2b(prompt.astype("<i4").tobytes(), digest_size=16).hexdigest()


def complete(rows: Sequence[Row], tails: Sequence[np.ndarray]) -> list[np.ndarray | None]:
    """Whole answers out of partial ones; None where tokens stay unanswered.

    rows: those of one prompt next to each other. tails: log-probs of the last tokens of each response, (<= R,) each, in
    nats. A missing beginning is taken from a response of the same prompt that has the same beginning and an answer to
    it: the log-prob of a token depends on nothing but the tokens before it.
    """
    found: list[np.ndarray | None] = [None] * len(rows)
    for _, group in groupby(range(len(rows)), key=lambda index: rows[index][0].tobytes()):
        members = list(group)
        # By what is missing: a response that lacks three tokens may have its first two from one that lacks two.
        for index in sorted(members, key=lambda member: len(rows[member][1]) - len(tails[member])):
            response, tail = rows[index][1], tails[index]
            missing = len(response) - len(tail)
            if not missing:
                found[index] = tail
                continue
            for other in members:
                whole = found[other]
                if whole is not None and np.array_equal(rows[other][1][:missing], response[:missing]):
                    found[index] = np.concatenate([whole[:missing], tail])
                    break
    return found


class FlatLogprobs(Protocol):
    """vllm.logprobs.FlatLogprobs: entries start_indices[i]:end_indices[i] of the other lists belong to token i."""

    start_indices: list[int]
    end_indices: list[int]
    token_ids: list[int]
    logprobs: list[float]
    ranks: list[int | None]


def ranked_logps(flat: FlatLogprobs, response: np.ndarray) -> np.ndarray:
    """Of the response's tokens, picked by id, log-prob in nats (a float32's value) and rank (1: the likeliest): (R, 2).

    flat: over prompt and response; the first token of all has no entry. response: the ids of the last R tokens, (R,).
    Counted from the end, because an engine that read the prompt from its cache may leave out the beginning. Raises
    ValueError if the answer is about other tokens.
    """
    if not len(response):
        return np.empty((0, 2))
    starts = np.asarray(flat.start_indices[-len(response) :])
    ends = np.asarray(flat.end_indices[-len(response) :])
    ids = np.asarray(flat.token_ids[starts[0] : ends[-1]])
    logps = np.asarray(flat.logprobs[starts[0] : ends[-1]], dtype=np.float32)
    # Asked for no alternatives, vLLM gives one entry a token, the token's own; tolerate alternatives beside it.
    owner = np.repeat(np.arange(len(starts)), ends - starts)
    own = np.flatnonzero(ids == response[owner])
    answered, first = np.unique(owner[own], return_index=True)
    if len(answered) != len(response):
        raise ValueError(f"vLLM gave log-probs for {len(answered)} of {len(response)} response tokens")
    ranks = np.asarray(flat.ranks[starts[0] : ends[-1]], dtype=np.float64)
    return np.stack([logps[own[first]].astype(np.float64), ranks[own[first]]], axis=1)
