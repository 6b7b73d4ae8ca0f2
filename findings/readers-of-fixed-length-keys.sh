#!/usr/bin/env bash
# What nine readers of Parquet make of keys of 16 bytes (FIXED_LEN_BYTE_ARRAY), of lists of float32, and of lists of float16
# in byte-stream-split, in files of ten row groups that pyarrow wrote, sorted by key.
#
# polars 2.1.0, pyarrow 26.0.1, pandas 3.1.1, duckdb 2.0.1, datafusion 55.0.0, daft 0.7.26, chdb 4.4.0 (ClickHouse 26.9),
# datasets 5.2.0, fastparquet 2026.9.0.
# Guess: all hand out 16 bytes as bytes but datasets (numpy) and fastparquet, which drop zeros at the end; all read lists of
# float32; DuckDB and fastparquet can't read the float16 columns; polars, pyarrow, pandas, DuckDB and datafusion read one row
# group of ten for one key, daft and chdb read all of them.
# Seen: the same, but that pandas, daft, chdb and datasets don't show what they read, and:
# - datasets hands out whole keys in its plain, pandas, arrow and polars formats; in numpy's they lose zeros at their end.
# - fastparquet reads neither float32 lists nor doubles where they are byte-stream-split ("Encoding 9"), so not one number.
# - DuckDB lists the float16 column as FLOAT[], and refuses to read it.
# - chdb gives bytes by Arrow, but in a DataFrame a bytearray, or a str where the bytes happen to be UTF-8.
# - daft's Binary[16] can't be compared with bytes; cast to Binary first.
# - pyarrow's fragments are pruned where the value has the column's own type (pa.scalar(key, pa.binary(16))), and not where
#   it is plain bytes, though the rows that come are the same.
# - pyarrow's Table.join takes no columns of lists; index_in and take do it.
# - chdb's left join has 0 as the log-prob of a row that is not there, unless join_use_nulls = 1; lists are empty even then.
# Fails where that changes.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
install() {
  python3 -m venv "$place/$1"
  "$place/$1/bin/pip" --disable-pip-version-check install --quiet "${@:2}" 2>/dev/null
}
install most polars==2.1.0 pyarrow==26.0.1 pandas==3.1.1 duckdb==2.0.1 chdb==4.4.0 datasets==5.2.0 fastparquet==2026.9.0
install datafusion datafusion==55.0.0  # these two want other versions of pyarrow
install daft daft==0.7.26
cat > "$place/write.py" <<'PYTHON'
import hashlib
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROWS, GROUPS = 2000, 10
keys = [hashlib.blake2b(str(i).encode(), digest_size=16).digest() for i in range(ROWS)]
keys = [key[:14] + b"\0\0" if i % 100 == 0 else key[:15] + b"\0" if i % 50 == 0 else key for i, key in enumerate(keys)]
keys = sorted([*keys[1:], b"sixteen letters!"])
logps = [np.float32(-np.arange(1, i % 5 + 2) / (i + 1)) for i in range(ROWS)]
halves = np.float16(np.random.default_rng(0).normal(size=(ROWS, 8)))
key = pa.field("response_key", pa.binary(16), nullable=False)
number = pa.field("element", pa.float32(), nullable=False)
rows = {"response_key": keys, "sum_logp": [float(row.sum()) for row in logps], "token_logps": logps}
required = {"sum_logp": pa.float64(), "token_logps": pa.list_(number)}
schema = pa.schema([key, *(pa.field(name, kind, nullable=False) for name, kind in required.items())])
options = {"row_group_size": ROWS // GROUPS, "use_dictionary": False, "compression": "zstd"}
options["sorting_columns"] = [pq.SortingColumn(0)]
split = {"sum_logp": "BYTE_STREAM_SPLIT", "token_logps.list.element": "BYTE_STREAM_SPLIT"}
pq.write_table(pa.table(rows, schema=schema), "logps.parquet", column_encoding=split, **options)
head = pa.FixedSizeListArray.from_arrays(pa.array(halves.ravel()), 8)
sketches = pa.table([pa.array(keys, key.type), head], names=["response_key", "head"])
pq.write_table(sketches, "sketches.parquet", column_encoding={"head.list.element": "BYTE_STREAM_SPLIT"}, **options)
written = {"keys": [k.hex() for k in keys], "logps": [row.tolist() for row in logps], "halves": halves.tolist()}
with open("written.json", "w") as file:
    json.dump(written, file)
PYTHON
cat > "$place/try.py" <<'PYTHON'
import json
import os
import re
import subprocess
import sys
from collections import Counter

LOGPS, SKETCHES = "logps.parquet", "sketches.parquet"
with open("written.json") as file:
    WRITTEN = json.load(file)
KEYS = [bytes.fromhex(key) for key in WRITTEN["keys"]]
ROW, KEY = next((row, key) for row, key in enumerate(KEYS) if row > 700 and key.endswith(b"\0"))
ABSENT = b"is not there 16b"
ASKED = {"response_key": [KEY, ABSENT]}
IN_SQL = "(select {0} as response_key union all select {1}) asked".format  # a bytes literal or an expression


def read_polars():
    import polars as pl

    frame = pl.read_parquet(LOGPS)
    yield frame["response_key"].to_list(), frame["token_logps"].to_list()
    joined = pl.DataFrame(ASKED).join(frame, on="response_key", how="left", validate="m:1")
    yield joined["token_logps"].to_list()
    code = f"import polars as pl; pl.scan_parquet('{LOGPS}').filter(pl.col('response_key') == pl.lit({KEY!r})).collect()"
    said = subprocess.run([sys.executable, "-c", code], env=os.environ | {"POLARS_VERBOSE": "1"}, capture_output=True)
    yield re.search(r"reading (\d+ / \d+) row groups", said.stderr.decode())[1].replace("/", "of")
    yield pl.read_parquet(SKETCHES)["head"].to_list()


def read_pyarrow():
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.dataset as ds
    import pyarrow.parquet as pq

    table = pq.read_table(LOGPS)
    yield table["response_key"].to_pylist(), table["token_logps"].to_pylist()
    asked = pa.table({"response_key": pa.array(ASKED["response_key"], pa.binary(16))})
    position = pc.index_in(asked["response_key"], table["response_key"])  # its own join takes no columns of lists
    yield table["token_logps"].take(position).to_pylist()
    fragment = next(ds.dataset(LOGPS).get_fragments())
    of = fragment.metadata.num_row_groups
    values = pa.scalar(KEY, pa.binary(16)), KEY
    typed, plain = (len(fragment.split_by_row_group(pc.field("response_key") == value)) for value in values)
    yield f"{typed} of {of}, of plain bytes {plain} of {of}"
    yield pq.read_table(SKETCHES)["head"].to_pylist()


def read_pandas():
    import pandas as pd

    frame = pd.read_parquet(LOGPS)
    yield frame["response_key"].tolist(), frame["token_logps"].tolist()
    joined = pd.DataFrame(ASKED).merge(frame, on="response_key", how="left", validate="m:1")["token_logps"]
    yield [None if isinstance(row, float) else row.tolist() for row in joined]  # NaN where there is none
    assert len(pd.read_parquet(LOGPS, filters=[("response_key", "==", KEY)])) == 1
    yield "not visible"
    yield pd.read_parquet(SKETCHES)["head"].tolist()


def read_duckdb():
    import duckdb

    connection = duckdb.connect()
    keys, logps = zip(*connection.sql(f"select response_key, token_logps from '{LOGPS}'").fetchall())
    yield keys, logps
    asked = IN_SQL(*(f"unhex('{key.hex()}')" for key in ASKED["response_key"]))
    joined = connection.sql(f"select token_logps, response_key from {asked} left join '{LOGPS}' using (response_key)")
    yield in_order((key, row) for row, key in joined.fetchall())
    query = f"explain analyze select sum_logp from '{LOGPS}' where response_key = unhex('{KEY.hex()}')"
    plan = connection.sql(query).fetchall()[0][1]
    yield re.search(r"Row Groups Scanned: (\d+ / \d+)", plan)[1].replace("/", "of")
    assert connection.sql(f"describe select head from '{SKETCHES}'").fetchall()[0][1] == "FLOAT[]"
    yield [row for (row,) in connection.sql(f"select head from '{SKETCHES}'").fetchall()]


def read_datafusion():
    import datafusion

    context = datafusion.SessionContext()
    context.register_parquet("logps", LOGPS)
    context.register_parquet("sketches", SKETCHES)
    rows = context.sql("select response_key, token_logps from logps").to_pydict()
    yield rows["response_key"], rows["token_logps"]
    asked = IN_SQL(*(f"arrow_cast(X'{key.hex()}', 'FixedSizeBinary(16)')" for key in ASKED["response_key"]))
    joined = context.sql(f"select asked.response_key, token_logps from {asked} left join logps using (response_key)")
    yield in_order(zip(*joined.to_pydict().values()))
    query = f"explain analyze select sum_logp from logps where response_key = X'{KEY.hex()}'"
    plan = str(context.sql(query).to_pydict()["plan"])
    total, matched = re.search(r"row_groups_pruned_statistics=(\d+) total → (\d+) matched", plan).groups()
    yield f"{matched} of {total}"
    yield context.sql("select head from sketches").to_pydict()["head"]


def read_daft():
    import daft

    frame = daft.read_parquet(LOGPS)
    rows = frame.to_pydict()
    yield rows["response_key"], rows["token_logps"]
    try:
        frame.where(daft.col("response_key") == KEY).to_pydict()
    except Exception as error:
        assert "Cannot perform comparison on types: Binary[16], Binary" in str(error)
    else:
        raise AssertionError("daft compares Binary[16] with bytes")
    cast = frame.with_column("response_key", daft.col("response_key").cast(daft.DataType.binary()))
    joined = daft.from_pydict(ASKED).join(cast, on="response_key", how="left").to_pydict()
    yield in_order(zip(joined["response_key"], joined["token_logps"]))
    yield "not visible"
    yield daft.read_parquet(SKETCHES).to_pydict()["head"]


def read_chdb():
    import chdb

    def table(columns, file):
        return chdb.query(f"select {columns} from file('{file}', Parquet)", "ArrowTable")

    rows = table("response_key, token_logps", LOGPS)
    frame = chdb.query(f"select response_key from file('{LOGPS}', Parquet)", "DataFrame")
    kinds = Counter(type(key).__name__ for key in frame["response_key"])
    assert kinds == {"bytearray": len(KEYS) - 1, "str": 1}, kinds
    yield rows["response_key"].to_pylist(), rows["token_logps"].to_pylist()
    asked = IN_SQL(*(f"toFixedString(unhex('{key.hex()}'), 16)" for key in ASKED["response_key"]))
    query = f"select asked.response_key as key, sum_logp, token_logps from {asked} left join "
    query += f"file('{LOGPS}', Parquet) as logps on asked.response_key = logps.response_key"
    # Without the setting an absent row is a log-prob of 0.
    assert 0.0 in chdb.query(query, "ArrowTable")["sum_logp"].to_pylist()
    joined = chdb.query(query + " settings join_use_nulls = 1", "ArrowTable").to_pydict()
    assert None in joined["sum_logp"] and 0.0 not in joined["sum_logp"]
    yield in_order((key, row or None) for key, row in zip(joined["key"], joined["token_logps"]))  # lists stay empty
    yield "not visible"
    yield table("head", SKETCHES)["head"].to_pylist()


def read_datasets():
    import datasets

    def rows(file):
        return datasets.load_dataset("parquet", data_files=file, split="train", cache_dir="datasets")

    plain = rows(LOGPS)
    for form in ("pandas", "arrow", "polars"):
        keys = plain.with_format(form)[:]["response_key"]
        assert (keys.to_pylist() if form == "arrow" else keys.to_list()) == KEYS, form
    lost = [key for key, found in zip(KEYS, plain.with_format("numpy")[:]["response_key"]) if bytes(found) != key]
    assert lost and lost == [key for key in KEYS if key.endswith(b"\0")]
    yield plain["response_key"][:], plain["token_logps"][:]
    import polars as pl

    yield pl.DataFrame(ASKED).join(plain.with_format("polars")[:], on="response_key", how="left")["token_logps"].to_list()
    yield "not visible"
    yield rows(SKETCHES)["head"][:]


def read_fastparquet():
    import fastparquet

    keys = fastparquet.ParquetFile(LOGPS).to_pandas(columns=["response_key"])["response_key"].tolist()
    try:
        logps = fastparquet.ParquetFile(LOGPS).to_pandas(columns=["token_logps"])["token_logps"].tolist()
    except NotImplementedError as error:
        logps = str(error)
    yield keys, logps
    yield [None, None]  # nothing to join
    yield "not visible"
    yield fastparquet.ParquetFile(SKETCHES).to_pandas(columns=["head"])["head"].tolist()


def in_order(pairs):
    found = dict(pairs)
    assert found.keys() == set(ASKED["response_key"]), found
    return [found[key] for key in ASKED["response_key"]]


def judge(found, written):
    if isinstance(found, str):
        return found
    return "right" if [list(map(float, row)) for row in found] == written else "wrong"


reader = sys.argv[1]
steps = globals()[f"read_{reader}"]()
keys, logps = next(steps)
joined = "right" if next(steps) == [WRITTEN["logps"][ROW], None] else "no"
pruned = next(steps)
try:
    halves = judge(next(steps), WRITTEN["halves"])
except Exception as error:
    halves = type(error).__name__ + ": " + str(error).splitlines()[0][:60]
kinds = "/".join(sorted({type(key).__name__ for key in keys}))
whole = "whole" if list(keys) == KEYS else "cut" if all(k.rstrip(b"\0") == f for k, f in zip(KEYS, keys)) else "wrong"
print(" | ".join([reader, kinds, whole, judge(logps, WRITTEN["logps"]), joined, pruned, halves]))
PYTHON
cd "$place"
most/bin/python write.py
changed=0
try() {  # environment, reader, expected line
  found=$("$1/bin/python" try.py "$2" 2>errors || { tail -n 3 errors >&2; echo "$2 failed"; })
  echo "$found"
  [ "$found" = "$2 | $3" ] || { echo "  this changed; it was: $3"; changed=1; }
}
echo "reader | key as | key | float32 lists | left join | row groups read for one key | float16, byte-stream-split"
try most polars "bytes | whole | right | right | 1 of 10 | right"
try most pyarrow "bytes | whole | right | right | 1 of 10, of plain bytes 10 of 10 | right"
try most pandas "bytes | whole | right | right | not visible | right"
try most duckdb "bytes | whole | right | right | 1 of 10 | Error: BYTE_STREAM_SPLIT encoding is only supported for FLOAT, DOUB"
try datafusion datafusion "bytes | whole | right | right | 1 of 10 | right"
try daft daft "bytes | whole | right | right | not visible | right"
try most chdb "bytes | whole | right | right | not visible | right"
try most datasets "bytes | whole | right | right | not visible | right"
try most fastparquet "bytes | cut | Encoding 9 | no | not visible | NotImplementedError: Encoding 9"
exit $changed
