"""Many keys at once: 16 bytes each in one numpy array, where a Python set of bytes takes well over a hundred.

numpy compares its strings byte by byte, as keys are ordered, but drops zeros at the end of one that is taken out
singly: of one key in 256. Its arrays stay inside, and what is handed out has other types (`key_bytes`, `whole_keys`).
"""

from collections.abc import Iterable, Iterator
from typing import Any, Self, TypeAlias

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from cache.keys import KEY_BYTES

KeyArray = npt.NDArray[np.bytes_]  # (n,) of dtype S16
Keys: TypeAlias = "Iterable[bytes] | pl.Series | pa.Array | pa.ChunkedArray | KeyArray"

KEY = np.dtype(f"S{KEY_BYTES}")
WHOLE_KEY = np.dtype(f"V{KEY_BYTES}")
ITERATED = 1 << 16  # keys turned into Python objects at once


def key_array(keys: Keys) -> KeyArray:
    """`keys` in their order, (n,) of dtype S16. Raises ValueError for a null, or a key that has not 16 bytes.

    Single items of such an array may be among them: numpy hands them out without the zeros at their end.
    """
    if isinstance(keys, np.ndarray):
        if keys.dtype.itemsize > KEY_BYTES:
            raise ValueError(f"keys have {KEY_BYTES} bytes; these are of dtype {keys.dtype}, {keys.dtype.itemsize}")
        array: KeyArray = keys.view(KEY) if keys.dtype == WHOLE_KEY else keys.astype(KEY, copy=False)
        return array
    column: Any = keys.to_arrow() if isinstance(keys, pl.Series) else keys
    if not isinstance(column, pa.Array | pa.ChunkedArray):
        column = pa.array(map(_whole, column), pa.binary(KEY_BYTES))
    if column.null_count:
        raise ValueError(f"{column.null_count} of {len(column)} keys are null")
    column = column.cast(pa.binary(KEY_BYTES))
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    raw = [np.frombuffer(c.buffers()[1], KEY, count=len(c), offset=KEY_BYTES * c.offset) for c in chunks if len(c)]
    return raw[0] if len(raw) == 1 else np.concatenate([np.empty(0, KEY), *raw])


def key_column(keys: KeyArray) -> pa.Array:
    """The inverse of `key_array` for an Arrow column."""
    buffer = pa.py_buffer(np.ascontiguousarray(keys).view(np.uint8))
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(KEY_BYTES), len(keys), [None, buffer])


def key_bytes(keys: KeyArray) -> list[bytes]:
    """The inverse of `key_array` for a list of bytes."""
    # As strings, numpy would drop trailing zeros.
    found: list[bytes] = whole_keys(keys).tolist()
    return found


def whole_keys(keys: KeyArray) -> npt.NDArray[np.void]:
    """The same keys as dtype V16, whose single items have all 16 bytes: bytes(key)."""
    found: npt.NDArray[np.void] = np.ascontiguousarray(keys).view(WHOLE_KEY)
    return found


def _whole(key: Any) -> Any:
    if isinstance(key, np.bytes_):
        return key.tobytes().ljust(KEY_BYTES, b"\0")
    return key.tobytes() if isinstance(key, np.void) else key


def partition_start(number: int, bits: int) -> bytes:
    """The smallest key whose leading `bits` bits are `number`."""
    return (number << (8 * KEY_BYTES - bits)).to_bytes(KEY_BYTES, "big")


class KeySet:
    """Distinct keys in ascending order, 16 bytes each: `array` is (n,) of dtype S16 and not to be changed."""

    def __init__(self, keys: Keys = ()) -> None:
        array = key_array(keys)
        if array is keys or not array.flags.owndata:
            array = array.copy()  # it is the caller's
        array.sort()  # in place, which takes no further memory
        repeated = array[1:] == array[:-1]
        self.array: KeyArray = array[np.append(True, ~repeated)] if repeated.any() else array

    @classmethod
    def from_sorted(cls, array: KeyArray) -> Self:
        """For keys that are known to be distinct and ascending; they are not copied, and may be memory-mapped."""
        made = cls.__new__(cls)
        made.array = array
        return made

    def __len__(self) -> int:
        return len(self.array)

    def __iter__(self) -> Iterator[bytes]:
        for start in range(0, len(self), ITERATED):
            yield from key_bytes(self.array[start : start + ITERATED])

    def __contains__(self, key: bytes) -> bool:
        try:
            return bool(self.positions(key_array([key]))[0] >= 0)
        except pa.ArrowInvalid:  # of another length, so no key
            return False

    def __or__(self, other: "KeySet") -> "KeySet":
        return KeySet(np.concatenate([self.array, other.array]))

    def __and__(self, other: "KeySet") -> "KeySet":
        return KeySet.from_sorted(self.array[other.contains(self.array)])

    def __sub__(self, other: "KeySet") -> "KeySet":
        return KeySet.from_sorted(self.array[~other.contains(self.array)])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, KeySet) and np.array_equal(self.array, other.array)

    __hash__ = None  # type: ignore[assignment]  # how Python says unhashable

    def positions(self, keys: KeyArray) -> npt.NDArray[np.int64]:
        """Where each of `keys` stands in `array`, (len(keys),); -1 for those that are not in the set."""
        if not len(self):
            return np.full(len(keys), -1)
        found = self.array.searchsorted(keys)
        # The position behind the last key is compared with the last one, which is smaller.
        return np.where(self.array[np.minimum(found, len(self) - 1)] == keys, found, -1)

    def contains(self, keys: KeyArray) -> npt.NDArray[np.bool_]:
        """Which of `keys` are in the set, (len(keys),)."""
        return self.positions(keys) >= 0

    def shared_with(self, other: "KeySet") -> int:
        """How many keys both have."""
        starts = range(0, len(self), ITERATED)
        return sum(int(np.count_nonzero(other.contains(self.array[s : s + ITERATED]))) for s in starts)

    def partition(self, number: int, bits: int) -> "KeySet":
        """Those whose leading `bits` bits are `number`; a view."""
        start = self.array.searchsorted(np.array([partition_start(number, bits)], KEY))[0]
        last = number + 1 == 1 << bits
        stop = None if last else self.array.searchsorted(np.array([partition_start(number + 1, bits)], KEY))[0]
        return KeySet.from_sorted(self.array[start:stop])


def locate(keys: Keys, among: Keys) -> npt.NDArray[np.int64]:
    """At which index of `among`, whose keys are distinct, each of `keys` stands, (len(keys),); -1 where it does not."""
    stored = key_array(among)
    order = np.argsort(stored, kind="stable")
    found = KeySet.from_sorted(stored[order]).positions(key_array(keys))
    return np.where(found >= 0, order[found], -1) if len(order) else found
