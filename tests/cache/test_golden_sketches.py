"""Sketches that version 1 wrote, read by today's code to the very values, which are typed in as in test_golden."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from cache import CacheMismatch, Journal, SketchIdentity, open_sketches, publish_reference, response_key, verify
from cache.garbage import compact_journal, journalled_keys
from cache.identity import recorded_identity
from cache.repair import sound_part
from cache.sketches import kind_of_columns, sketches_table

GOLDEN = Path(__file__).parent / "golden" / "v1"
REFERENCE_ID = "56829e7ed0df20eee531231afa5a7b5c"
IDENTITY = SketchIdentity(
    weights="0123456789abcdef0123456789abcdef",
    config="fedcba9876543210fedcba9876543210",
    trainable='{"kind":"lora","r":4}',
    adapter_init="00112233445566778899aabbccddeeff",
    mode="tensorsketch",
    k=3,
    audit=2,
    seed=7,
    hash_version=1,
    dtype="float32",
    groups='{"block_000":3,"head":2}',
)
# prompt, response, response_key, grad_norm
ROWS = [
    ([1, 2, 3], [4, 5], "2e0798681b9fcba8a6150998260266b9", 0.10000000149011612),
    ([1, 2, 3], [2], "2ac08a77f5d3d2ad1bae812b5df96fb8", 3.4028234663852886e38),
    ([0], [151935], "e893909e55c4eacc98ad0ab3df0ab484", 0.0),
    ([2147483647, 0], [9, 9, 9, 2], "e67733614771b9b52608db082e7175cb", 1.401298464324817e-45),
]
# of each row, its numbers and their scale; what is stored is their quotient
VALUES = {
    "block_000": [
        ([0.5, -1.25, 3.0], 2.0**-13),
        ([2.0**127, -(2.0**110), 0.0], 2.0**113),
        ([0.0, 0.0, 0.0], 1.0),
        ([2.0**-126, 0.0, 2.0**-140], 2.0**-126),
    ],
    "head": [([0.0, 0.0], 1.0), ([1.0, 0.333251953125], 2.0**-14), ([0.0, 0.0], 1.0), ([-7.0, 7.99609375], 2.0**-12)],
    "audit": [([1.0, -1.0], 2.0**-14), ([2.0**-20, 0.0], 2.0**-34), ([0.0, 0.0], 1.0), ([-0.0, 5.0], 2.0**-12)],
}
KEYS = [bytes.fromhex(row[2]) for row in ROWS]


@pytest.fixture
def golden(tmp_path):
    """A copy, since opening a journal writes its lock file."""
    return Path(shutil.copytree(GOLDEN, tmp_path / "v1"))


def expected(rows):
    """As they are stored; rows: their numbers."""
    found = []
    for row in rows:
        made = {"response_key": KEYS[row], "grad_norm": ROWS[row][3]}
        for group, values in VALUES.items():
            numbers, scale = values[row]
            made |= {group: [number / scale for number in numbers], f"{group}_scale": scale}
        found.append(made)
    return found


def values():
    """{group: (rows, numbers)} float32."""
    return {group: np.array([numbers for numbers, _ in rows], np.float32) for group, rows in VALUES.items()}


ALL = range(4)


def plain(table):
    """Rows of a table as Python numbers; float16 comes as numpy's."""
    return [
        {name: [float(x) for x in value] if isinstance(value, list) else value for name, value in row.items()}
        for row in table.to_pylist()
    ]


def by_key(rows):
    return sorted(rows, key=lambda row: row["response_key"])


def test_the_keys_and_the_identity_of_version_1_are_those_typed_in():
    for prompt_ids, response_ids, key, _ in ROWS:
        assert response_key(prompt_ids, response_ids).hex() == key
    assert IDENTITY.reference_id == REFERENCE_ID


def test_the_sketches_of_version_1_are_sound_and_read_to_the_very_values(golden):
    assert verify(golden / "sketches") == []
    sketches = open_sketches(golden / "sketches", expect=IDENTITY)
    assert (sketches.n_rows, sketches.n_tokens, sketches.identity.widths) == (4, 0, {"block_000": 3, "head": 2})
    assert plain(sketches.rows(KEYS).to_arrow()) == expected(ALL)
    assert sound_part(golden / "sketches", IDENTITY).manifest == sketches.manifest
    (batch,) = sketches.batches(list(VALUES))
    order = np.argsort(np.array(KEYS, "S16"))
    for group, wanted in values().items():
        np.testing.assert_array_equal(batch[1][group], wanted[order])


def test_whoever_reads_the_shard_with_polars_alone_gets_the_same():
    frame = pl.read_parquet(GOLDEN / "sketches" / "*.parquet")
    assert plain(frame.to_arrow()) == by_key(expected(ALL))


def test_the_journal_of_version_1_reads_to_the_very_values(golden):
    """It holds two appends of two rows that share one."""
    folder = golden / "sketch-journal" / REFERENCE_ID
    assert journalled_keys(folder) == set(KEYS[:3]) and recorded_identity(folder, SketchIdentity) == IDENTITY
    with Journal(folder, IDENTITY.kind) as journal:
        assert [row for table in journal.tables() for row in plain(table)] == expected([0, 1, 2])
    compact_journal(folder, {KEYS[1]})
    with Journal(folder, IDENTITY.kind) as journal:
        assert [row for table in journal.tables() for row in plain(table)] == expected([1])


def test_rows_of_version_1_are_kept_when_more_are_published(golden):
    """Today's writer may compress otherwise, but takes and gives the same rows."""
    old = open_sketches(golden / "sketches", expect=IDENTITY).rows(KEYS).to_arrow()
    publish_reference(golden / "sketches", old, IDENTITY)
    assert plain(open_sketches(golden / "sketches", expect=IDENTITY).rows(KEYS).to_arrow()) == expected(ALL)
    again = sketches_table(KEYS, np.array([row[3] for row in ROWS], np.float32), values())
    assert plain(again) == expected(ALL)
    assert kind_of_columns(again.schema).schema == IDENTITY.kind.schema


def test_a_newer_manifest_and_another_formula_of_the_hashes_are_refused(golden):
    file = golden / "sketches" / "manifest.json"
    with pytest.raises(CacheMismatch, match="hash_version: found 1, expected 2"):
        open_sketches(golden / "sketches", expect=replace(IDENTITY, hash_version=2))
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format_version": 2}))
    before = file.read_bytes()
    for read in (lambda: open_sketches(golden / "sketches", expect=None), lambda: verify(golden / "sketches")):
        with pytest.raises(CacheMismatch, match=r"format version 2; this refcache reads up to 1.*upgrade"):
            read()
    assert file.read_bytes() == before
