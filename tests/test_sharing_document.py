"""docs/sharing.md is what people paste, so its Python is run here, against a storage of the test's own."""

import re
from pathlib import Path

import polars as pl
import pytest

from cache import publish_reference
from tests import ROOT
from tests.cache.rows import identity, make_rows
from tests.object_storage import BUCKET, storage

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs/sharing.md").read_text(), re.DOTALL)


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    publish_reference(Path("data/reference/logps"), make_rows(0, 50), identity())
    with storage() as running:
        yield running


def run(block: str) -> dict[str, object]:
    """Its names; an expression at its end goes to `last`."""
    names: dict[str, object] = {}
    *lines, last = block.rstrip().splitlines()
    exec("\n".join([*lines, last if last[0].isspace() or "=" in last.split("(")[0] else f"last = {last}"]), names)
    return names


def test_the_documented_lines_copy_a_store_and_read_it_there(server):
    copy, read, scan = BLOCKS
    run(copy)
    keys = [item["Key"] for item in server.client.list_objects_v2(Bucket=BUCKET)["Contents"]]
    assert {key.rpartition("/")[2] for key in keys} == {p.name for p in Path("data/reference/logps").iterdir()}
    written = [key for method, key in server.asked if method in ("PUT", "POST")]
    assert written[-1].endswith("/manifest.json")
    here = pl.read_parquet("data/reference/logps/*.parquet").sort("response_key")
    assert run(read)["last"].equals(here.head(3).select("n_tokens", "sum_logp"))
    assert run(scan)["last"].row(0) == (50, here["n_tokens"].sum(), pytest.approx(here["sum_logp"].mean()))
