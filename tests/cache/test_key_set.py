"""KeySet and its relatives against Python's own sets, for keys as digests never are: zeros, repeats, one byte apart."""

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache import KeySet, locate
from cache.key_set import key_array, key_bytes, whole_keys

keys = st.lists(st.builds(lambda head, tail: head + bytes(14) + tail, *[st.sampled_from([b"\0", b"a", b"\xff"])] * 2))
keys |= st.lists(st.binary(min_size=16, max_size=16))


@given(keys)
def test_keys_survive_the_array_in_order_and_with_trailing_zeros(given_keys):
    column = pa.chunked_array([given_keys[:2], given_keys[2:]], pa.binary(16))
    for form in (given_keys, pl.Series(given_keys, dtype=pl.Binary), column, column.slice(1), key_array(given_keys)):
        expected = given_keys[1:] if form is not column and isinstance(form, pa.ChunkedArray) else given_keys
        assert key_bytes(key_array(form)) == expected
    array = key_array(given_keys)
    singly = (
        [key for key in array],
        [key for key in whole_keys(array)],
        whole_keys(array),
        np.array(given_keys, "V16"),
    )
    assert all(key_bytes(key_array(form)) == given_keys for form in singly)
    assert [bytes(key) for key in whole_keys(array)] == given_keys


def test_what_has_not_16_bytes_is_no_key():
    key = b"k" * 12 + bytes(4)
    assert key in KeySet([key])
    assert key[:12] not in KeySet([key]) and key + b"zz" not in KeySet([key])
    for wrong in ([b"x" * 20], [b"x" * 12], np.array([b"x" * 20])):
        with pytest.raises(ValueError):
            key_array(wrong)


@given(keys, keys)
@settings(max_examples=40)
def test_a_key_set_is_a_sorted_set(one, other):
    mine, theirs = KeySet(one), KeySet(other)
    assert list(mine) == sorted(set(one)) and len(mine) == len(set(one))
    assert list(mine | theirs) == sorted(set(one) | set(other))
    assert list(mine - theirs) == sorted(set(one) - set(other))
    assert mine.contains(key_array(other)).tolist() == [key in set(one) for key in other]
    assert all((key in mine) == (key in set(one)) for key in other)
    assert (mine == theirs) == (set(one) == set(other))
    found = mine.positions(key_array(other))
    assert [list(mine)[at] if at >= 0 else None for at in found] == [key if key in mine else None for key in other]


@given(keys, st.integers(0, 9))
@settings(max_examples=40)
def test_partitions_are_the_leading_bits(given_keys, bits):
    whole = KeySet(given_keys)
    for number in range(1 << bits):
        expected = [key for key in whole if int.from_bytes(key, "big") >> (128 - bits) == number]
        assert list(whole.partition(number, bits)) == expected


@given(keys, st.randoms(use_true_random=False))
@settings(max_examples=40)
def test_locate_finds_where_each_key_stands(given_keys, randoms):
    among = list(set(given_keys))
    randoms.shuffle(among)
    asked = [*given_keys, b"nowhere to find!"]
    assert locate(asked, among).tolist() == [among.index(key) if key in among else -1 for key in asked]


def test_what_is_no_key_is_refused():
    for wrong in ([b"short"], [None], [b"seventeen bytes!!"], pl.Series([b"short"])):
        with pytest.raises(ValueError):
            KeySet(wrong)
    with pytest.raises(ValueError, match="null"):
        key_array(pa.array([None], pa.binary(16)))


def test_a_set_of_a_million_keys_takes_sixteen_megabytes():
    made = KeySet(np.frombuffer(np.random.default_rng(0).bytes(16 << 20), "S16"))
    assert made.array.nbytes == 16 << 20
