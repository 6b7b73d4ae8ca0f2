"""The random numbers behind a sketch: frozen, the same on every machine and device, named by the parameter.

For a parameter NAME (as `canonical_name` gives it) and one of its axes, the word of index i is word i of Philox4x64-10
(Salmon et al. 2011) with the 128-bit key

    BLAKE2b-128(uint32 version | int64 seed | purpose, axis and name as UTF-8, each followed by a zero byte)

(personalisation "refcache", little-endian), counter blocks counted from 1, four words each. A word's lowest bit is the
sign (0: plus), the rest modulo k the bucket. So a hash knows neither k nor the other parameters, and what is stored
stays comparable when blocks are added or k is chosen anew. Any change here is a new HASH_VERSION.
"""

import hashlib
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

HASH_VERSION = 1
SKETCH, AUDIT = "sketch", "audit"  # purposes: two independent families of hashes
OUT, IN = "out", "in"  # axes: rows of a weight matrix, or the elements of a vector, are OUT; columns are IN


def hash_words(name: str, axis: str, size: int, *, seed: int, purpose: str) -> np.ndarray:
    """Words 0..size-1, uint64 (size,); a longer axis continues a shorter one."""
    message = HASH_VERSION.to_bytes(4, "little") + seed.to_bytes(8, "little", signed=True)
    message += b"".join(part.encode() + b"\0" for part in (purpose, axis, name))
    key = hashlib.blake2b(message, digest_size=16, person=b"refcache").digest()
    return np.random.Philox(key=np.frombuffer(key, "<u8").astype(np.uint64)).random_raw(size)


class AxisHash(NamedTuple):
    """buckets: (size,) int64 in 0..k-1. signs: (size,) float32, +1 or -1."""

    buckets: Tensor
    signs: Tensor


def axis_hash(words: np.ndarray, k: int) -> AxisHash:
    buckets = ((words >> np.uint64(1)) % np.uint64(k)).astype(np.int64)
    signs = 1 - 2 * (words & np.uint64(1)).astype(np.float32)
    return AxisHash(torch.from_numpy(buckets), torch.from_numpy(signs))


def hashes(k: int, *, seed: int, purpose: str, device: torch.device) -> Callable[[str, str, int], AxisHash]:
    """(parameter's canonical name, axis, size) -> AxisHash on `device`; each is made once."""

    @cache
    def find(name: str, axis: str, size: int) -> AxisHash:
        made = axis_hash(hash_words(name, axis, size, seed=seed, purpose=purpose), k)
        return AxisHash(made.buckets.to(device), made.signs.to(device))

    return find
