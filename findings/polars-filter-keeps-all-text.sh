#!/usr/bin/env bash
# A polars frame that was filtered holds the text of all rows it was filtered from; neither its size nor `rechunk` tells.
#
# polars 2.1.0, pyarrow 26.0.1.
# Expected: a twentieth of a frame's rows takes about a twentieth of its memory once the frame itself is gone.
# Seen: of 300 frames of 5 MB of text each, the kept twentieth takes as much memory as all of them (1.4 GB) while
# `estimated_size` says 46 MB, and `rechunk` changes nothing. Rows that pyarrow filters before polars takes them over take
# 90 MB.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet polars==2.1.0 pyarrow==26.0.1
cat > "$place/try.py" <<'PYTHON'
import sys

import polars as pl
import pyarrow as pa

ROWS, FRAMES, EVERY = 2000, 300, 20
WAYS = {
    "pyarrow filters": lambda table, mask: pl.DataFrame(table.filter(pa.array(mask))),
    "polars filters": lambda table, mask: pl.DataFrame(table).filter(pl.Series(mask)),
    "polars filters, rechunk": lambda table, mask: pl.DataFrame(table).filter(pl.Series(mask)).rechunk(),
}


def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) // 1024 for line in file if line.startswith("RssAnon"))


before, kept = anonymous(), []
for number in range(FRAMES):
    table = pa.table({"text": pa.array([f"{number}-{row} " * 200 for row in range(ROWS)])})
    kept.append(WAYS[sys.argv[1]](table, [row % EVERY == 0 for row in range(ROWS)]))
estimated = sum(frame.estimated_size() for frame in kept) // 2**20
print(anonymous() - before, estimated)
PYTHON
changed=0
try() {  # what should hold of the two numbers, then the way
  read -r held estimated < <("$place/venv/bin/python" "$place/try.py" "$2")
  echo "$2: $held MB held, $estimated MB by estimated_size"
  [ "$((held $1 10 * estimated))" = 1 ] || { echo "this changed: expected held $1 10 x estimated"; changed=1; }
}
try "<" "pyarrow filters"
try ">" "polars filters"
try ">" "polars filters, rechunk"
exit $changed
