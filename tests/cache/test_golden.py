"""Files that version 1 wrote, read by today's code to the very values; files of a later version, refused untouched.

The values below are typed in, not computed by the package, so that a change of its arithmetic can't hide itself.
"""

import json
import shutil
import struct
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq
import pytest

from cache import (
    CacheCorrupt,
    CacheMismatch,
    Journal,
    ReferenceIdentity,
    logps_table,
    open_reference,
    prompt_key,
    publish_reference,
    response_key,
    verify,
)
from cache.garbage import compact_journal, journalled_keys
from cache.identity import recorded_identity
from cache.manifest import file_digest
from cache.repair import damaged_files, sound_part

GOLDEN = Path(__file__).parent / "golden" / "v1"
REFERENCE_ID = "6f1ed269599b23e39ee7a0a1f87ebf73"
SHARD = "logps-00000-737246c95583ab12f0dae826077156a0.parquet"
IDENTITY = ReferenceIdentity(
    weights="0123456789abcdef0123456789abcdef",
    config="fedcba9876543210fedcba9876543210",
    adapter=None,
    dtype="float32",
    quantization=None,
    engine="vllm",
    engine_version="0.32.0",
)
TENTH = -0.10000000149011612  # float32's -0.1
LOWEST, SMALLEST = -3.4028234663852886e38, -1.401298464324817e-45  # float32's largest and smallest magnitude
# prompt, response, token log-probs, their float64 sum, prompt_key, response_key
A, B, C = "a241b146745b738670b5b991da60516b", "205b897522da241a25de8f76ebe1ab6f", "f010e00042a0b0007bff1ac4d0475443"
ROWS = [
    ([1, 2, 3], [4, 5], [-0.5, -1.25], -1.75, A, "2e0798681b9fcba8a6150998260266b9"),
    ([1, 2, 3], [4, 5, 2], [-0.5, -1.25, -0.0078125], -1.7578125, A, "b080da088e6c637a18cac1efe6c8ed4a"),
    ([1, 2, 3], [2], [-7.75], -7.75, A, "2ac08a77f5d3d2ad1bae812b5df96fb8"),
    ([0], [151935], [-12.0625], -12.0625, B, "e893909e55c4eacc98ad0ab3df0ab484"),
    ([2147483647, 0], [9, 9, 9, 2], [TENTH, 0.0, LOWEST, SMALLEST], LOWEST, C, "e67733614771b9b52608db082e7175cb"),
]
KEYS = [bytes.fromhex(row[5]) for row in ROWS]


@pytest.fixture
def golden(tmp_path):
    """A copy, since opening a journal writes its lock file."""
    return Path(shutil.copytree(GOLDEN, tmp_path / "v1"))


def expected(rows):
    return [
        {
            "response_key": bytes.fromhex(response),
            "prompt_key": bytes.fromhex(prompt),
            "n_prompt_tokens": len(prompt_ids),
            "n_tokens": len(response_ids),
            "sum_logp": total,
            "token_ids": response_ids,
            "token_logps": logps,
        }
        for prompt_ids, response_ids, logps, total, prompt, response in rows
    ]


def test_the_keys_of_version_1_follow_from_the_token_ids():
    for prompt_ids, response_ids, _, _, prompt, response in ROWS:
        assert (prompt_key(prompt_ids).hex(), response_key(prompt_ids, response_ids).hex()) == (prompt, response)


def test_the_reference_of_version_1_is_sound_and_reads_to_the_very_values(golden):
    assert verify(golden / "logps") == []
    reference = open_reference(golden / "logps", expect=IDENTITY)
    assert (reference.n_rows, reference.n_tokens, reference.identity.reference_id) == (5, 11, REFERENCE_ID)
    assert reference.rows(KEYS).to_dicts() == expected(ROWS)
    assert sound_part(golden / "logps", IDENTITY).manifest == reference.manifest


def test_whoever_reads_the_shard_with_polars_alone_gets_the_same():
    found = pl.read_parquet(GOLDEN / "logps" / "*.parquet").to_dicts()
    assert found == sorted(expected(ROWS), key=lambda row: row["response_key"])


def test_the_journal_of_version_1_reads_to_the_very_values(golden):
    folder = golden / "journal" / REFERENCE_ID
    assert journalled_keys(folder) == set(KEYS[:4]) and recorded_identity(folder, ReferenceIdentity) == IDENTITY
    with Journal(folder) as journal:
        assert [row for table in journal.tables() for row in table.to_pylist()] == expected(ROWS[:4])
    compact_journal(folder, {KEYS[2]})
    with Journal(folder) as journal:
        assert [row for table in journal.tables() for row in table.to_pylist()] == expected(ROWS[2:3])


def test_rows_of_version_1_are_kept_when_more_are_published(golden):
    """Today's writer may compress otherwise, but takes and gives the same rows."""
    old = open_reference(golden / "logps", expect=IDENTITY).scan().collect().to_arrow()
    publish_reference(golden / "logps", old, IDENTITY)
    assert open_reference(golden / "logps", expect=IDENTITY).rows(KEYS).to_dicts() == expected(ROWS)
    assert json.loads((golden / "logps" / "manifest.json").read_text())["format_version"] == 1
    again = logps_table(
        response_keys=[response_key(row[0], row[1]) for row in ROWS],
        prompt_keys=[prompt_key(row[0]) for row in ROWS],
        n_prompt_tokens=[len(row[0]) for row in ROWS],
        token_ids=[row[1] for row in ROWS],
        token_logps=[row[2] for row in ROWS],
    )
    assert again.to_pylist() == expected(ROWS)


def test_the_golden_files_name_no_machine():
    for file in GOLDEN.rglob("*"):
        content = file.read_bytes() if file.is_file() else b""
        assert not any(root in content for root in (b"/home", b"/root", b"/tmp", b"/work", b"/usr", b"\\Users"))


# what a later version might write -------------------------------------------------------------------------------------


def state(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "lock"}


def require_refused(folder, read, kind, message):
    before = state(folder)
    with pytest.raises(kind, match=message):
        read()
    assert state(folder) == before


def change_manifest(folder, **changes):
    file = folder / "logps" / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_shard(folder, **changes):
    """The shard with other statements in its own metadata, and a name and manifest that fit it; returns the name."""
    old = folder / "logps" / SHARD
    table = pq.read_table(old)
    stated = json.loads(table.schema.metadata[b"refcache"]) | changes
    old.unlink()
    pq.write_table(table.replace_schema_metadata({b"refcache": json.dumps(stated).encode()}), old)
    digest = file_digest(old)
    new = old.rename(old.with_name(f"logps-00000-{digest[:32]}.parquet"))
    entry = {"file": new.name, "rows": 5, "tokens": 11, "bytes": new.stat().st_size, "blake2b": digest}
    change_manifest(folder, shards=[entry])
    return new.name


def test_a_newer_manifest_is_refused_with_upgrade_and_left_alone(golden):
    change_manifest(golden, format_version=2, shards={"packed": "otherwise"})
    for read in (lambda: open_reference(golden / "logps", expect=None), lambda: verify(golden / "logps")):
        require_refused(golden, read, CacheMismatch, r"format version 2; this refcache reads up to 1.*upgrade")


def test_a_newer_shard_is_refused_with_upgrade_and_never_lent(golden):
    shard = change_shard(golden, format_version=2)
    for read in (
        lambda: open_reference(golden / "logps", expect=IDENTITY),
        lambda: verify(golden / "logps"),
        lambda: damaged_files(golden / "logps", IDENTITY),
    ):
        require_refused(golden, read, CacheMismatch, rf"{shard} has format version 2.*Upgrade")
    assert sound_part(golden / "logps", IDENTITY) is None


def test_a_newer_journal_is_refused_with_upgrade_and_left_alone(golden):
    folder = golden / "journal" / REFERENCE_ID
    content = (folder / "rows.journal").read_bytes()
    (folder / "rows.journal").write_bytes(content[:8] + struct.pack("<I", 2) + content[12:])
    for read in (
        lambda: Journal(folder).__enter__(),
        lambda: journalled_keys(folder),
        lambda: compact_journal(folder, set()),
    ):
        require_refused(golden, read, CacheMismatch, r"format version 2.*Upgrade")


def test_unknown_fields_are_refused_where_they_could_change_the_meaning(golden):
    identity = json.loads((golden / "logps" / "manifest.json").read_text())["identity"]
    change_manifest(golden, packed=True)
    require_refused(golden, lambda: open_reference(golden / "logps", expect=None), CacheCorrupt, "packed")
    shutil.copy(GOLDEN / "logps" / "manifest.json", golden / "logps" / "manifest.json")
    with pytest.raises(CacheMismatch, match=r"\['rope_scaling'\].*upgrade"):
        ReferenceIdentity.from_dict(identity | {"rope_scaling": "yarn"})


def test_an_unknown_remark_in_a_shard_is_no_obstacle(golden):
    change_shard(golden, written_by="a later release")
    assert open_reference(golden / "logps", expect=IDENTITY).rows(KEYS).to_dicts() == expected(ROWS)
    assert sound_part(golden / "logps", IDENTITY).n_rows == 5
