"""What the kill tests look at: the journal as it lies on disk, read by the format's description alone."""

import json
import struct
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from cache import response_key


def journalled(home: Path) -> Counter[bytes]:
    """How often each key stands in the one journal under `home`; a torn end is left out."""
    found: Counter[bytes] = Counter()
    for journal in home.glob("journal/*/rows.journal"):
        for payload in _payloads(journal.read_bytes()):
            found.update(pa.ipc.open_stream(payload).read_all()["response_key"].to_pylist())
    return found


def _payloads(content: bytes) -> Iterator[bytes]:
    assert content[:8] == b"RCJOURNL"
    position = 12
    while len(content) >= position + 20:
        magic, length, checksum = struct.unpack_from("<8sQI", content, position)
        payload = content[position + 20 : position + 20 + length]
        if magic != b"\xf1RCFRAME" or len(payload) < length or zlib.crc32(payload) != checksum:
            return
        yield payload
        position += 20 + length


def asked(file: Path) -> list[bytes]:
    """The keys of all rows that reached a stand-in engine, in order, from the file named in its wish."""
    lines = file.read_text().splitlines() if file.exists() else []
    return [response_key(*row) for line in lines for row in json.loads(line)]


def published(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def shards(folder: Path) -> dict[str, bytes]:
    """The manifest and what it lists, without companions such as drift.json, which hang on other params."""
    return {name: content for name, content in published(folder).items() if name.split(".")[0] != "drift"}
