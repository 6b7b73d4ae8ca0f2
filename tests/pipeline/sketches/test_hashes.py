"""The hashes of sketches are frozen: every stored sketch depends on them for ever."""

import numpy as np
import pytest
import torch

from pipeline.model.parts import canonical_name
from pipeline.sketches.hashes import AUDIT, IN, OUT, SKETCH, axis_hash, hash_words, hashes
from tests.pipeline.sketches.slow_sketches import philox, words

NAME = "model.layers.0.self_attn.q_proj.weight"


def test_the_slow_philox_gives_the_published_answers():
    """Known answers of the authors' Random123 library (kat_vectors, philox4x64 10)."""
    ones = (1 << 64) - 1
    assert philox([0] * 4, [0] * 2) == [
        0x16554D9ECA36314C,
        0xDB20FE9D672D0FDC,
        0xD7E772CEE186176B,
        0x7E68B68AEC7BA23B,
    ]
    assert philox([ones] * 4, [ones] * 2) == [
        0x87B092C3013FE90B,
        0x438C3C67BE8D0224,
        0x9CC7D7C69CD777B6,
        0xA09CAEBF594F0BA0,
    ]


@pytest.mark.parametrize("purpose", [SKETCH, AUDIT])
@pytest.mark.parametrize("seed", [0, 7, -1, 2**40])
def test_words_follow_from_the_documented_formula(seed, purpose):
    for axis in (OUT, IN):
        assert hash_words(NAME, axis, 11, seed=seed, purpose=purpose).tolist() == words(NAME, axis, 11, seed, purpose)


def test_golden_vectors():
    """Computed once by tests/pipeline/sketches/slow_sketches.py; no release may change them."""
    assert hash_words(NAME, OUT, 4, seed=0, purpose=SKETCH).tolist() == [
        16309676445367522282,
        14122460824585469553,
        5888372258600396137,
        6469940666740201974,
    ]
    made = axis_hash(hash_words(NAME, OUT, 4, seed=0, purpose=SKETCH), 1000)
    assert made.buckets.tolist() == [141, 776, 68, 987]
    assert made.signs.tolist() == [1, -1, -1, 1]


def test_a_longer_axis_continues_a_shorter_one_and_k_only_folds_it():
    long = hash_words(NAME, IN, 100, seed=1, purpose=SKETCH)
    assert (hash_words(NAME, IN, 37, seed=1, purpose=SKETCH) == long[:37]).all()
    assert (axis_hash(long, 64).buckets == axis_hash(long, 256).buckets % 64).all()


def test_name_axis_seed_and_purpose_each_give_other_hashes():
    found = [
        hash_words(name, axis, 8, seed=seed, purpose=purpose).tolist()
        for name in (NAME, NAME.replace("0", "1"))
        for axis in (OUT, IN)
        for seed in (0, 1)
        for purpose in (SKETCH, AUDIT)
    ]
    assert len({tuple(row) for row in found}) == len(found)


def test_buckets_and_signs_are_spread_evenly():
    made = axis_hash(hash_words(NAME, OUT, 64_000, seed=0, purpose=SKETCH), 64)
    counts = np.bincount(made.buckets, minlength=64)
    # Chi-squared with 63 degrees of freedom: mean 63, deviation 11.2.
    assert ((counts - 1000) ** 2 / 1000).sum() < 63 + 5 * 11.2
    assert abs(made.signs.mean().item()) < 5 / 64_000**0.5
    assert abs((made.signs * (made.buckets % 2 * 2 - 1)).mean().item()) < 5 / 64_000**0.5


def test_tables_are_made_once():
    find = hashes(16, seed=0, purpose=SKETCH, device=torch.device("cpu"))
    assert find(NAME, OUT, 5) is find(NAME, OUT, 5)


@pytest.mark.parametrize(
    ("wrapped", "canonical"),
    [
        (NAME, NAME),
        ("base_model.model.model.layers.3.q_proj.lora_B.default.weight", "model.layers.3.q_proj.lora_B.weight"),
        ("base_model.model.model.layers.3.q_proj.base_layer.weight", "model.layers.3.q_proj.weight"),
    ],
)
def test_canonical_names_know_no_wrapper(wrapped, canonical):
    assert canonical_name(wrapped) == canonical
