#!/bin/sh
# pyarrow 26.0.1: pa.set_memory_pool() does not reach the Parquet and IPC writers.
#
# Guess: after pa.set_memory_pool(pa.system_memory_pool()) all of pyarrow allocates from that pool, as the name and
# pa.default_memory_pool() say.
# Seen: tables that are made or read come from it, but what writers allocate (pages, compression) still comes from the
# pool that was the default at the start: of a Parquet table 38 MB there and 0.4 MB in the new pool, of a compressed IPC
# file all 4 MB. Peak memory of programs that write large tables is therefore unchanged by it. The environment variable
# ARROW_DEFAULT_MEMORY_POOL, read when pyarrow is imported, moves the writers too.
# Fails where either changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "pyarrow==26.0.1" 2>/dev/null
cat > "$folder/try.py" <<'PY'
import sys

import pyarrow as pa
import pyarrow.parquet as pq

folder, switched = sys.argv[1], sys.argv[2] == "set_memory_pool"
first, system = pa.default_memory_pool(), pa.system_memory_pool()
if switched:
    pa.set_memory_pool(system)
print(f"pyarrow {pa.__version__}, {sys.argv[2]}: the default is {pa.default_memory_pool().backend_name}")
assert pa.default_memory_pool().backend_name == "system"


def allocated(work):
    before = [pool.total_bytes_allocated() for pool in (first, system)]
    work()
    return [pool.total_bytes_allocated() - b for pool, b in zip((first, system), before)]


def write_ipc():
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with pa.ipc.new_file(f"{folder}/t.arrow", table.schema, options=options) as writer:
        writer.write_table(table)


table = pa.table({"x": list(range(200_000)), "s": ["abcabcabc"] * 200_000})
works = {
    "make an array": lambda: pa.array(range(100_000)),
    "write Parquet": lambda: pq.write_table(table, f"{folder}/t.parquet"),
    "write IPC": write_ipc,
    "read Parquet": lambda: pq.read_table(f"{folder}/t.parquet"),
}
for name, work in works.items():
    old, new = allocated(work)
    print(f"  {name}: {old:,} bytes from the first pool, {new:,} from the system's")
    if switched:
        assert (old > 10 * new) == name.startswith("write"), name
    else:
        assert first.backend_name == "system" and new > 0, name
PY
"$folder/venv/bin/python" "$folder/try.py" "$folder" set_memory_pool
ARROW_DEFAULT_MEMORY_POOL=system "$folder/venv/bin/python" "$folder/try.py" "$folder" ARROW_DEFAULT_MEMORY_POOL
