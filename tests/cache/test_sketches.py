"""Sketches as stored rows: the journal, shards and checks of log-probs, with columns and an identity of their own."""

import json
from dataclasses import replace

import hypothesis.extra.numpy as numpy_strategies
import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache import (
    CacheCorrupt,
    CacheError,
    CacheIncomplete,
    CacheMismatch,
    Journal,
    KeySet,
    SketchIdentity,
    open_reference,
    open_sketches,
    publish_reference,
    publish_rows,
    response_key,
    verify,
)
from cache.repair import sound_part
from cache.sketches import group_values, sketches_table
from tests.cache import rows as logps_rows

GROUPS = {"block_000": 16, "head": 5}
IDENTITY = SketchIdentity(
    weights="a1" * 16,
    config="b2" * 16,
    trainable='"all"',
    mode="tensorsketch",
    k=16,
    audit=4,
    seed=0,
    hash_version=1,
    dtype="float32",
    groups=json.dumps(GROUPS),
)


def keys(start, stop):
    return [response_key([1], [i]) for i in range(start, stop)]


def make_values(start, stop):
    """Numbers of rows start..stop-1, over many magnitudes; row i is the same whoever makes it."""
    found = {}
    for group, width in (GROUPS | {"audit": 4}).items():
        draws = [
            np.random.default_rng([i, width]).normal(size=width) * 10.0 ** (i % 13 - 6) for i in range(start, stop)
        ]
        found[group] = np.array(draws, np.float32).reshape(-1, width)
    return found


def make_rows(start, stop):
    return sketches_table(keys(start, stop), np.arange(start, stop, dtype=np.float32), make_values(start, stop))


def test_sketches_read_back_in_key_order_with_their_scale(tmp_path):
    publish_reference(tmp_path / "out", make_rows(0, 50), IDENTITY)
    sketches = open_sketches(tmp_path / "out", expect=IDENTITY)
    found, values = zip(*sketches.batches(["head", "audit"]), strict=True)
    order = np.argsort(np.array(keys(0, 50), "S16"))
    assert (np.concatenate(found) == np.array(keys(0, 50), "S16")[order]).all()
    for group in ("head", "audit"):
        wanted = make_values(0, 50)[group][order]
        got = np.concatenate([batch[group] for batch in values])
        assert (np.abs(got - wanted) <= 2.0**-11 * np.abs(wanted) + 2.0**-39 * np.abs(wanted).max(1)[:, None]).all()
    assert sketches.rows(keys(7, 8), ["grad_norm"])["grad_norm"].to_list() == [7.0]
    assert sketches.n_rows == 50 and sketches.identity.widths == GROUPS


LARGE, SMALL = st.floats(-(2.0**100), 2.0**100, width=32), st.floats(-(2.0**-100), 2.0**-100, width=32)


@settings(max_examples=40, deadline=None)
@given(numpy_strategies.arrays(np.float32, (3, 6), elements=LARGE | SMALL))
def test_stored_numbers_are_off_by_a_rounding_to_eleven_bits_at_most(values):
    table = sketches_table(keys(0, 3), np.ones(3, np.float32), {"head": values})
    bound = 2.0**-11 * np.abs(values.astype(np.float64)) + 2.0**-39 * np.abs(values).max(1)[:, None] + 2.0**-149
    assert (np.abs(group_values(table, "head").astype(np.float64) - values) <= bound).all()


def test_polars_alone_reads_a_shard(tmp_path):
    publish_reference(tmp_path, make_rows(0, 5), IDENTITY)
    frame = pl.read_parquet(tmp_path / "*.parquet")
    assert frame.columns == [
        "response_key",
        "grad_norm",
        *("block_000", "block_000_scale", "head", "head_scale", "audit", "audit_scale"),
    ]
    values = frame.select(pl.col("head").cast(pl.List(pl.Float32)).list.eval(pl.element()) * pl.col("head_scale"))
    order = np.argsort(np.array(keys(0, 5), "S16"))
    np.testing.assert_allclose(np.array(values["head"].to_list()), make_values(0, 5)["head"][order], rtol=2.0**-10)


def test_journalled_and_published_rows_make_the_same_shards_in_any_history(tmp_path):
    publish_reference(tmp_path / "once", make_rows(0, 40), IDENTITY)
    publish_reference(tmp_path / "grown", make_rows(0, 30), IDENTITY)
    with Journal(tmp_path / "journal", IDENTITY.kind) as journal:
        journal.append(make_rows(30, 33))
        journal.append(make_rows(33, 41))
    wanted = KeySet(keys(0, 40))
    with Journal(tmp_path / "journal", IDENTITY.kind) as journal:
        sources = [journal, sound_part(tmp_path / "grown", IDENTITY)]
        publish_rows(tmp_path / "grown", wanted, sources, IDENTITY, scratch=tmp_path / "scratch")
    contents = [{p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("once", "grown")]
    assert contents[0] == contents[1] and verify(tmp_path / "grown") == []


def test_large_rows_go_to_more_shards_and_smaller_row_groups(tmp_path, monkeypatch):
    monkeypatch.setattr("cache.sketches.SHARD_BYTES", 20 * 100)
    monkeypatch.setattr("cache.sketches.ROW_GROUP_BYTES", 5 * 100)
    publish_reference(tmp_path, make_rows(0, 100), IDENTITY)
    sketches = open_sketches(tmp_path, expect=IDENTITY)
    assert len(sketches.manifest.shards) == 8 and verify(tmp_path) == []
    assert sketches.keys() == set(keys(0, 100))
    assert max(len(found) for found, _ in sketches.batches(["head"])) <= 5 * 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head": np.inf}, "numbers in head that are not finite"),
        ({"audit": np.nan}, "numbers in audit that are not finite"),
        ({"norm": -1.0}, "gradient norm that is negative"),
        ({"norm": np.nan}, "gradient norm that is negative or not finite"),
    ],
)
def test_what_is_not_finite_is_refused_with_the_key(tmp_path, change, message):
    values, norms = make_values(0, 3), np.ones(3, np.float32)
    for name, value in change.items():
        (norms if name == "norm" else values[name][:, 0])[1] = value
    with (
        Journal(tmp_path / "journal", IDENTITY.kind) as journal,
        pytest.raises(CacheError, match=f"{keys(1, 2)[0].hex()} has .*{message}"),
    ):
        journal.append(sketches_table(keys(0, 3), norms, values))


def test_zeros_are_stored_as_zeros():
    """The sketch of a LoRA whose gradient vanishes, say."""
    table = sketches_table(keys(0, 2), np.zeros(2, np.float32), {"head": np.zeros((2, 5), np.float32)})
    assert not group_values(table, "head").any()


@pytest.mark.parametrize(
    ("field", "value"),
    [("trainable", '"last_block"'), ("weights", "c3" * 16), ("k", 32), ("adapter_init", "d4" * 16), ("seed", 1)],
)
def test_sketches_of_anything_else_are_refused_with_both_values(tmp_path, field, value):
    publish_reference(tmp_path, make_rows(0, 3), IDENTITY)
    other = replace(IDENTITY, **{field: value})
    with pytest.raises(CacheMismatch) as caught:
        open_sketches(tmp_path, expect=other)
    stored = getattr(IDENTITY, field)
    shown = "none" if stored is None else str(stored)[:12]
    for part in (f"  {field}: found {shown}", str(value)[:12], "dvc repro sketch"):
        assert part in str(caught.value)


def test_the_source_is_written_only_where_an_engine_took_them(tmp_path):
    """It came after version 1's first publications, whose bytes and digests must not change."""
    assert "source" not in IDENTITY.to_dict() and SketchIdentity.from_dict(IDENTITY.to_dict()) == IDENTITY
    by_engine = replace(IDENTITY, source="engine")
    assert SketchIdentity.from_dict(by_engine.to_dict()) == by_engine
    publish_reference(tmp_path, make_rows(0, 3), by_engine)
    with pytest.raises(CacheMismatch, match="source: found engine, expected none"):
        open_sketches(tmp_path, expect=IDENTITY)


def test_sketches_and_log_probs_are_never_taken_for_each_other(tmp_path):
    publish_reference(tmp_path / "sketches", make_rows(0, 3), IDENTITY)
    publish_reference(tmp_path / "logps", logps_rows.make_rows(0, 3), logps_rows.identity())
    with pytest.raises(CacheMismatch, match="kind 'sketches', expected 'logps'"):
        open_reference(tmp_path / "sketches", expect=None)
    with pytest.raises(CacheMismatch, match="kind 'logps', expected 'sketches'"):
        open_sketches(tmp_path / "logps", expect=None)


def test_none_is_a_sound_publication_without_rows(tmp_path):
    none = SketchIdentity(mode="none")
    publish_reference(tmp_path, none.kind.schema.empty_table(), none)
    assert verify(tmp_path) == [] and open_sketches(tmp_path, expect=none).n_rows == 0
    with pytest.raises(CacheMismatch, match="mode: found none, expected tensorsketch"):
        open_sketches(tmp_path, expect=IDENTITY)


def test_damage_and_absence_say_what_to_run(tmp_path):
    with pytest.raises(CacheIncomplete, match="dvc repro sketch"):
        open_sketches(tmp_path / "absent", expect=None)
    publish_reference(tmp_path, make_rows(0, 30), IDENTITY)
    with pytest.raises(CacheIncomplete, match=r"lacks 1 of the 2.*dvc repro sketch"):
        open_sketches(tmp_path, expect=IDENTITY).rows(keys(29, 31))
    (shard,) = tmp_path.glob("*.parquet")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    (finding,) = verify(tmp_path)
    assert finding.file == shard.name and "dvc repro -f sketch" in finding.remedy
    with pytest.raises(CacheCorrupt, match=r"damaged.*dvc repro -f sketch"):
        list(open_sketches(tmp_path, expect=IDENTITY).batches(["head"]))
    assert sound_part(tmp_path, IDENTITY) is None
