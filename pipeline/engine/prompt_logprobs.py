"""Reading a response's log-probs out of what vLLM answers for a whole sequence."""

from typing import Protocol

import numpy as np


class FlatLogprobs(Protocol):
    """vllm.logprobs.FlatLogprobs: entries start_indices[i]:end_indices[i] of the other lists belong to token i."""

    start_indices: list[int]
    end_indices: list[int]
    token_ids: list[int]
    logprobs: list[float]


def response_logps(flat: FlatLogprobs, response: np.ndarray) -> np.ndarray:
    """Log-probs of the response's tokens, picked by token id: nats, (R,) float32.

    flat: over prompt and response; the first token of all has no entry. response: the ids of the last R tokens, (R,).
    Counted from the end, because an engine that read the prompt from its cache may leave out the beginning. Raises
    ValueError if the answer is about other tokens.
    """
    if not len(response):
        return np.empty(0, np.float32)
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
    return logps[own[first]]
