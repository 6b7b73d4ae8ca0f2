#!/usr/bin/env bash
# The first array that pyarrow makes imports pandas, if it is installed, whatever the array holds.
#
# pyarrow 26.0.1, pandas 3.1.1.
# Expected: pa.array([1]) of a Python list does not load a library that neither the input nor the result needs.
# Seen: importing pyarrow leaves pandas alone; the first pa.array, pa.scalar or schema.empty_table() imports all of it, a
# few tenths of a second in every process that makes one array. A table made of no batches does without.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet pyarrow==26.0.1 pandas==3.1.1
for what in 'pa.Table.from_batches([], pa.schema([("a", pa.int32())]))' 'pa.array([1])' 'pa.scalar(1)' \
  'pa.schema([("a", pa.int32())]).empty_table()'; do
  "$place/venv/bin/python" - "$what" <<'PY'
import sys
import time

import pyarrow as pa

assert "pandas" not in sys.modules
started = time.perf_counter()
eval(sys.argv[1])
loaded = "pandas" in sys.modules
print(f"{sys.argv[1]:70} {'imports pandas' if loaded else 'no pandas'}, {time.perf_counter() - started:.2f} s")
assert loaded == ("from_batches" not in sys.argv[1]), "this changed"
PY
done
