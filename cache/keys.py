"""Content keys of prompts and responses: 16 bytes of BLAKE2b over token ids.

A key knows nothing but token ids: a changed chat template, tokenizer or truncation changes it, and nothing else does.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

# Versions the byte layout below, apart from the file format: a new column must not void every key ever computed.
KEY_VERSION = 1
KEY_BYTES = 16

TokenIds = Sequence[int] | npt.NDArray[Any]


def prompt_key(prompt_ids: TokenIds) -> bytes:
    """Key of a prompt's token ids, 16 bytes. Raises ValueError for ids that are no int32 >= 0."""
    return _digest(_part(prompt_ids, "prompt_ids"))


def response_key(prompt_ids: TokenIds, response_ids: TokenIds) -> bytes:
    """Key of a response under its prompt, 16 bytes; moving a token across the boundary changes it.

    Never equal to a prompt_key, not even for an empty response. Raises ValueError for ids that are no int32 >= 0.
    """
    return _digest(_part(prompt_ids, "prompt_ids"), _part(response_ids, "response_ids"))


def _part(ids: TokenIds, name: str) -> bytes:
    """The count as uint32, then the ids as int32, all little-endian. The count is what marks the boundary."""
    array = np.asarray(ids)
    if array.size == 0:
        array = array.astype(np.int32)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"{name} must be a flat sequence of integers, got shape {array.shape} of {array.dtype}")
    # Of int32, which nearly all are, the dtype says the rest.
    if array.size and (array.min() < 0 or (array.dtype != np.int32 and array.max() > np.iinfo(np.int32).max)):
        raise ValueError(f"{name} must lie in 0..2^31-1, got {array.min()}..{array.max()}")
    return array.size.to_bytes(4, "little") + array.astype("<i4").tobytes()


def _digest(*parts: bytes) -> bytes:
    digest = hashlib.blake2b(KEY_VERSION.to_bytes(4, "little"), digest_size=KEY_BYTES, person=b"refcache")
    for part in parts:
        digest.update(part)
    return digest.digest()
