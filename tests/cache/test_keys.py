import hashlib
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache import prompt_key, response_key

ids = st.lists(st.integers(0, 2**31 - 1), max_size=6)
few_ids = st.lists(st.integers(0, 1), max_size=4)  # collisions of a careless layout live among short, similar lists


def documented_key(*parts):
    """docs/cache-format.md, word for word, with struct and hashlib alone."""
    message = struct.pack("<I", 1) + b"".join(struct.pack(f"<I{len(p)}i", len(p), *p) for p in parts)
    return hashlib.blake2b(message, digest_size=16, person=b"refcache").digest()


def test_keys_have_the_values_they_always_had():
    assert prompt_key([1, 2, 3]).hex() == "a241b146745b738670b5b991da60516b"
    assert response_key([1, 2, 3], [4, 5]).hex() == "2e0798681b9fcba8a6150998260266b9"
    assert response_key([0], [2**31 - 1]).hex() == "1e154177b5d5e2892d1567383ce92e15"


@given(ids, ids)
def test_keys_follow_the_documented_layout(prompt, response):
    assert prompt_key(prompt) == documented_key(prompt)
    assert response_key(prompt, response) == documented_key(prompt, response)


@given(st.tuples(few_ids, few_ids), st.tuples(few_ids, few_ids))
def test_different_prompt_boundary_or_response_means_a_different_key(one, other):
    assert (response_key(*one) == response_key(*other)) == (one == other)


@given(ids, ids)
def test_moving_the_boundary_changes_the_key(prompt, response):
    whole = prompt + response
    keys = {response_key(whole[:cut], whole[cut:]) for cut in range(len(whole) + 1)}
    assert len(keys) == len(whole) + 1


@given(ids, ids)
def test_a_prompt_key_is_never_a_response_key(prompt, response):
    assert prompt_key(prompt) != response_key(prompt, [])
    assert prompt_key(prompt + response) != response_key(prompt, response)


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint16, ">i4"])
def test_the_key_depends_on_values_not_on_how_they_are_held(dtype):
    assert response_key(np.array([1, 2], dtype), np.array([3], dtype)) == response_key((1, 2), [3])


@pytest.mark.parametrize("wrong", [[-1], [2**31], [1.0], [[1, 2]], np.array([True]), ["1"]])
def test_ids_that_are_no_int32_are_refused(wrong):
    with pytest.raises(ValueError, match="response_ids must"):
        response_key([1], wrong)
