"""A reference cache in object storage: what is asked of the storage, what comes back, what is said when it fails."""

import fcntl
import json
import os
import resource
import socket
import threading
import time
from pathlib import Path

import polars as pl
import pytest
from werkzeug.serving import make_server

from cache import (
    CacheCorrupt,
    CacheError,
    CacheIncomplete,
    CacheMismatch,
    join_sum_logps,
    key_batches,
    open_reference,
    open_sketches,
    publish_reference,
    remote,
    shards,
)
from tests.cache import test_sketches
from tests.cache.rows import identity, keys_of, make_rows
from tests.object_storage import BUCKET

ROWS = make_rows(0, 60)
ABSENT = make_rows(500, 502)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Rows 0..59 in eight shards."""
    monkeypatch.setattr(shards, "SHARD_ROWS", 10)
    publish_reference(tmp_path / "logps", ROWS, identity())
    return tmp_path / "logps"


@pytest.fixture
def address(server, folder):
    """Where a copy of `folder` lies, which nobody has asked for yet."""
    found = server.put(folder, folder.parent.name)
    server.asked.clear()
    return found


@pytest.fixture(autouse=True)
def copies(tmp_path, monkeypatch):
    """Where copies go that nobody asked to be kept: afresh for each test, as for each process."""
    monkeypatch.setattr(remote, "_temporary_folder", lambda: tmp_path / "temporary")


@pytest.fixture
def asked(server, folder):
    """The names of the objects whose content was asked for."""
    return lambda: server.objects_read(folder.parent.name)


def shards_of(folder: Path, keys: list[bytes]) -> set[str]:
    """Which files hold these keys, by looking into all of them."""
    held = {file.name: set(pl.read_parquet(file)["response_key"]) for file in folder.glob("*.parquet")}
    return {name for name, found in held.items() if found & set(keys)}


def overwrite(server, address: str, name: str, content: bytes) -> None:
    server.client.put_object(Bucket=BUCKET, Key=f"{address.removeprefix(f's3://{BUCKET}/')}/{name}", Body=content)


def delete(server, address: str, name: str) -> None:
    server.client.delete_object(Bucket=BUCKET, Key=f"{address.removeprefix(f's3://{BUCKET}/')}/{name}")


def test_opening_reads_the_manifest_and_one_listing(server, address):
    reference = open_reference(address, expect=identity())
    assert reference.n_rows == 60
    assert server.asked == {
        ("HEAD", f"{address.removeprefix('s3://')}/manifest.json"): 1,
        ("GET", f"{address.removeprefix('s3://')}/manifest.json"): 1,
        ("GET", BUCKET): 1,
    }


def test_rows_fetch_the_shards_that_hold_them_and_each_of_them_once(server, folder, address, asked):
    reference, local = open_reference(address, expect=identity()), open_reference(folder, expect=identity())
    server.asked.clear()
    few, more = keys_of(ROWS)[:2], keys_of(ROWS)[:9]
    assert 0 < len(shards_of(folder, few)) < len(shards_of(folder, more)) < 8  # or this would show nothing
    assert reference.rows(few[::-1]).equals(local.rows(few[::-1]))
    assert asked() == shards_of(folder, few)
    assert reference.rows(more, ["sum_logp"]).equals(local.rows(more, ["sum_logp"]))
    assert asked() == shards_of(folder, more)
    assert set(server.asked.values()) == {1}


def test_rows_that_are_absent_are_named_and_cost_only_the_shards_they_would_be_in(address, folder, asked):
    reference = open_reference(address, expect=identity())
    absent = keys_of(ABSENT)
    assert reference.missing([*absent, keys_of(ROWS)[0]]) == absent
    assert len(asked() - {"manifest.json"}) <= 3
    with pytest.raises(CacheIncomplete, match=f"{address} lacks 2 of the 3 responses.*{absent[0].hex()}"):
        reference.rows([absent[0], keys_of(ROWS)[0], absent[1]])
    assert len(asked() - {"manifest.json"}) <= 3


def test_all_rows_read_as_from_a_folder(address, folder):
    here, there = (open_reference(path, expect=identity()) for path in (folder, address))
    assert there.scan().collect().equals(here.scan().collect())  # nobody holds on to what was opened
    assert there.keys() == here.keys()
    pairs = folder.parent / "pairs.parquet"
    pl.DataFrame({"chosen_key": keys_of(ROWS)[:20], "rejected_key": keys_of(ROWS)[20:40]}).write_parquet(pairs)
    joined = [
        join_sum_logps(reference, key_batches(pairs, ["chosen_key", "rejected_key"]), scratch=folder.parent / "scratch")
        for reference in (here, there)
    ]
    assert (joined[0] == joined[1]).all()
    assert open_reference(address, expect=None).scan().select(pl.len()).collect().item() == 60


def test_another_reference_is_refused_before_any_shard_is_read(address, asked):
    with pytest.raises(CacheMismatch, match="dtype: found float32, expected bfloat16"):
        open_reference(address, expect=identity(dtype="bfloat16"))
    assert asked() == {"manifest.json"}


@pytest.mark.slow
def test_a_damaged_object_is_refused_by_its_address_and_costs_only_its_rows(server, folder, address):
    key, *others = keys_of(ROWS)
    (damaged,) = shards_of(folder, [key])
    content = bytearray((folder / damaged).read_bytes())
    content[len(content) // 2] ^= 1
    overwrite(server, address, damaged, bytes(content))
    reference = open_reference(address, expect=identity())
    for read in (lambda: reference.rows([key]), reference.scan, lambda: reference.rows([key])):
        with pytest.raises(CacheCorrupt, match=f"{address}/{damaged} is damaged: its bytes hash to"):
            read()
    assert not (reference.path / damaged).exists()
    sound = [key for key in others if shards_of(folder, [key]) != {damaged}]
    assert len(reference.rows(sound)) == len(sound)


@pytest.mark.parametrize("change", ["cut", "missing", "stray"])
def test_what_a_listing_shows_is_refused_on_opening(server, folder, address, change, asked):
    name = min(file.name for file in folder.glob("*.parquet"))
    if change == "missing":
        delete(server, address, name)
    else:
        hit = name if change == "cut" else f"logps-00000-{'0' * 32}.parquet"
        overwrite(server, address, hit, (folder / name).read_bytes()[:-1])
        name = hit
    with pytest.raises(CacheCorrupt, match=f"{address}.*{name}"):
        open_reference(address, expect=identity())
    assert asked() == {"manifest.json"}


def test_shards_under_each_others_numbers_are_refused(server, folder, address):
    """The names say which rows are where, so one that lies would make rows look absent."""
    manifest = json.loads((folder / "manifest.json").read_text())
    one, other = (shard["file"] for shard in manifest["shards"][:2])
    swapped = {one: one.replace("-00000-", "-00001-"), other: other.replace("-00001-", "-00000-")}
    for shard in manifest["shards"][:2]:
        delete(server, address, shard["file"])
        overwrite(server, address, swapped[shard["file"]], (folder / shard["file"]).read_bytes())
        shard["file"] = swapped[shard["file"]]
    manifest["shards"].sort(key=lambda shard: shard["file"])
    overwrite(server, address, "manifest.json", json.dumps(manifest).encode())
    with pytest.raises(CacheCorrupt, match="holds keys of another partition"):
        open_reference(address, expect=identity()).rows(keys_of(ROWS))


def test_a_publication_that_is_replaced_while_it_is_read_is_told_from_damage(server, folder, address):
    reference = open_reference(address, expect=identity())
    held, gone = keys_of(ROWS)[0], shards_of(folder, keys_of(ROWS)) - shards_of(folder, keys_of(ROWS)[:1])
    before = reference.rows([held])
    publish_reference(folder, make_rows(0, 75), identity())
    server.put(folder, folder.parent.name)
    for name in gone:
        delete(server, address, name)
    with pytest.raises(CacheError, match=f"{address} was published anew while it was being read"):
        reference.rows(keys_of(ROWS))
    assert reference.rows([held]).equals(before)


def test_a_shard_that_goes_missing_is_damage(server, folder, address):
    reference = open_reference(address, expect=identity())
    (name,) = shards_of(folder, keys_of(ROWS)[:1])
    delete(server, address, name)
    with pytest.raises(CacheCorrupt, match=f"{address} cannot be read.*{name}"):
        reference.rows(keys_of(ROWS)[:1])


def test_copies_serve_later_readers_and_a_damaged_copy_is_fetched_again(server, folder, address, asked, tmp_path):
    copies = tmp_path / "copies"
    open_reference(address, expect=identity(), copies=copies).scan()
    assert asked() == {"manifest.json", *(file.name for file in folder.glob("*.parquet"))}
    server.asked.clear()
    again = open_reference(address, expect=identity(), copies=copies)
    assert again.rows(keys_of(ROWS)).height == 60
    assert asked() == {"manifest.json"}
    hurt = next(copies.glob("*/*.parquet"))
    hurt.write_bytes(hurt.read_bytes()[:-1] + b"?")
    assert open_reference(address, expect=identity(), copies=copies).rows(keys_of(ROWS)).height == 60
    assert asked() == {"manifest.json", hurt.name}


def test_copies_of_other_publications_are_removed_unless_someone_reads_them(server, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "KEPT_BYTES", 0)
    held: dict[Path, int] = {}
    monkeypatch.setattr(remote, "_held", held)
    copies = tmp_path / "copies"

    def read(rows):
        publish_reference(tmp_path / str(rows), make_rows(0, rows), identity())
        address = server.put(tmp_path / str(rows), f"{tmp_path.name}/{rows}")
        reference = open_reference(address, expect=identity(), copies=copies)
        reference.scan()
        return reference.path

    unread, by_another = read(5), read(6)
    os.close(held.pop(unread))
    os.close(held.pop(by_another))
    descriptor = os.open(by_another, os.O_RDONLY)  # as another process would
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    ours = read(7)
    assert not unread.exists()
    read(8)
    os.close(descriptor)
    assert by_another.exists() and ours.exists()
    for descriptor in held.values():
        os.close(descriptor)


def test_a_copy_that_cannot_be_kept_is_no_damage(server, folder, address, tmp_path):
    reference = open_reference(address, expect=identity())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # as a full disk
    try:
        with pytest.raises(
            CacheError, match=r"Cannot keep a copy of logps-.*\.parquet in .*: File too large"
        ) as raised:
            reference.scan()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not isinstance(raised.value, CacheCorrupt)
    assert list(reference.path.iterdir()) == []
    assert reference.scan().collect().height == 60
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match=f"Cannot keep copies of {address} in {tmp_path}/file"):
        open_reference(address, expect=identity(), copies=tmp_path / "file")


def test_sketches_are_read_in_place_too(server, tmp_path):
    publish_reference(tmp_path / "sketches", test_sketches.make_rows(0, 50), test_sketches.IDENTITY)
    address = server.put(tmp_path / "sketches", f"{tmp_path.name}/sketches")
    found = open_sketches(address, expect=test_sketches.IDENTITY).scan().collect()
    assert found.equals(open_sketches(tmp_path / "sketches", expect=None).scan().collect())
    with pytest.raises(CacheMismatch, match=f"{address} is a reference cache of kind 'sketches'"):
        open_reference(address, expect=None)


@pytest.fixture
def quickly():
    """What fails over the network says so within seconds."""
    started = time.monotonic()
    yield
    assert time.monotonic() - started < 12


@pytest.mark.parametrize("name", ["nothing/here", ""])
def test_an_address_without_a_publication_is_named(server, name, quickly):
    with pytest.raises(CacheIncomplete, match=f"s3://{BUCKET}/?{name} is no published reference cache"):
        open_reference(f"s3://{BUCKET}/{name}", expect=None)


@pytest.mark.parametrize("address", ["s3://", "https://somewhere/logps", "hf://datasets/some/logps"])
def test_an_address_of_an_unknown_kind_is_named(address):
    with pytest.raises(CacheIncomplete, match="is no folder in object storage: expected BUCKET/PATH behind s3://"):
        open_reference(address, expect=None)


def test_an_absent_bucket_is_named(server, quickly):
    with pytest.raises(CacheIncomplete, match="s3://absent/logps: there is no such bucket"):
        open_reference("s3://absent/logps", expect=None)


def test_a_storage_that_refuses_says_what_to_look_at(server, monkeypatch, quickly):
    def refuse(environ, respond):
        respond("403 Forbidden", [("Content-Type", "application/xml")])
        return [b"<Error><Code>AccessDenied</Code><Message>no</Message></Error>"]

    refusing = make_server("127.0.0.1", 0, refuse)
    thread = threading.Thread(target=refusing.serve_forever)
    thread.start()
    try:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{refusing.port}")
        with pytest.raises(CacheError, match=r"the storage refuses access\. Check the address, .*AWS_ACCESS_KEY_ID"):
            open_reference(f"s3://{BUCKET}/logps", expect=None)
    finally:
        refusing.shutdown()
        thread.join()
        refusing.server_close()


@pytest.mark.slow
@pytest.mark.parametrize("silent", [False, True])
def test_a_storage_out_of_reach_is_told_within_seconds(server, monkeypatch, silent, quickly):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        if silent:
            nobody.listen()
            monkeypatch.setattr(remote, "SILENT_FOR", 1)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{nobody.getsockname()[1]}")
        with pytest.raises(CacheError, match=f"Cannot read s3://{BUCKET}/logps: the storage can't be reached"):
            open_reference(f"s3://{BUCKET}/logps", expect=None)
