"""docs/cache-format.md is the contract with readers that are not ours, so what it says is run here."""

import re
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq
import pytest

from cache import CacheIncomplete, derived, journal, publish_reference, schema, view
from tests import ROOT
from tests.cache.rows import identity, keys_of, make_rows

DOCUMENT = (ROOT / "docs" / "cache-format.md").read_text()


def test_the_documented_lines_compute_the_documented_keys():
    (lines,) = [block for block in re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL) if "hashlib" in block]
    names: dict[str, object] = {}
    exec(lines, names)
    stated = re.findall(r"^(key\(.*?\)\.hexdigest\(\)) +# ([0-9a-f]{32})", lines, re.MULTILINE)
    assert len(stated) == 2
    for expression, digest in stated:
        assert eval(expression, names) == digest


def test_the_documented_view_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    publish_reference(Path("data/reference/logps"), make_rows(0, 200), identity())
    (lines,) = [block for block in re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL) if "open_view" in block]
    names: dict[str, object] = {}
    exec(lines, names)
    (path,) = [path for path in Path(".refcache/views").iterdir() if path.is_dir()]
    for file in (view.ROWS, view.KEYS, derived.SIZES):
        assert (path / file).is_file() and f"| `{file}` |" in DOCUMENT


def test_the_documented_join_says_what_it_misses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = make_rows(0, 6)
    publish_reference(Path("data/reference/logps"), rows.slice(0, 5), identity())
    keys = keys_of(rows)
    Path("data/prepared/pairs").mkdir(parents=True)
    pairs = pl.DataFrame({"chosen_key": keys[:2], "rejected_key": [keys[4], keys[5]]})
    pairs.write_parquet("data/prepared/pairs/pairs.parquet")
    (lines,) = [block for block in re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL) if "join_rows" in block]
    names: dict[str, object] = {}
    exec(lines, names)
    assert names["pairs"]["chosen_sum_logp"].to_list() == rows["sum_logp"].to_pylist()[:2]
    assert names["pairs"]["rejected_sum_logp"].to_list() == [rows["sum_logp"][4].as_py(), None]
    pairs.select("rejected_key", chosen_key="rejected_key").write_parquet("data/prepared/pairs/pairs.parquet")
    with pytest.raises(CacheIncomplete, match=keys[5].hex()):
        exec(lines, {})


def test_the_documented_columns_are_those_of_a_shard(tmp_path):
    publish_reference(tmp_path, make_rows(0, 3), identity())
    (shard,) = tmp_path.glob("*.parquet")
    section = DOCUMENT.partition("## Shards")[2].partition("## ")[0]
    stated = re.findall(r"^\| `(\w+)` \| ([\w() ]+) \|", section, re.MULTILINE)
    types = {"fixed_len_byte_array(16)": "fixed_size_binary[16]", "list of int32": "list<element: int32>"}
    types |= {"list of float": "list<element: float>"}
    found = pq.read_schema(shard)
    assert [(name, types.get(kind, kind)) for name, kind in stated] == [
        (field.name, str(field.type).replace("item:", "element:")) for field in found
    ]


@pytest.mark.parametrize("table", ["identity", "manifest"])
def test_every_stored_field_is_documented(tmp_path, table):
    manifest = publish_reference(tmp_path, make_rows(0, 3), identity())
    fields = vars(manifest) | vars(manifest.shards[0]) if table == "manifest" else identity().to_dict()
    assert [name for name in fields if f"`{name}`" not in DOCUMENT] == []


def test_the_documented_constants_are_those_of_the_code():
    assert f"version {schema.FORMAT_VERSION}\n" in DOCUMENT.splitlines(keepends=True)[0]
    assert journal.MAGIC.decode() in DOCUMENT and journal.FRAME_MAGIC.hex(" ").upper() in DOCUMENT
    assert f"row groups of {schema.ROW_GROUP_ROWS:,} rows" in DOCUMENT
