"""How time and memory of the reference cache follow its rows: synthetic rows, each operation in a process of its own.

    python benchmarks/store_scale.py --rows 500000 2000000 5000000 --out benchmarks/results/DATE-store-scale.md

Rows are generated from a seed, batch by batch; values are random, responses have 16 to 48 tokens. The parent samples
each child's anonymous memory (what the process itself allocated), since pages of files that it maps or reads count into
its resident memory as well, but belong to the system, which takes them back when it needs them.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402

from benchmarks.sizes import size_of, table  # noqa: E402
from cache import (  # noqa: E402
    LOGPS_SCHEMA,
    Journal,
    Reference,
    ReferenceIdentity,
    join_sum_logps,
    key_batches,
    open_reference,
    open_view,
    publish_rows,
    require_keys,
)

SEED = 20261120
FRAME_ROWS = 1_000  # rows a journal frame, an even number
BATCH_ROWS = 512  # of the shuffled epochs
EPOCH_SECONDS = 10.0  # a shuffled epoch is cut off after so long
PAIR_COLUMNS = ["chosen_key", "rejected_key"]
IDENTITY = ReferenceIdentity(
    weights="0" * 64,
    config="0" * 64,
    adapter=None,
    dtype="float32",
    quantization=None,
    engine="none",
    engine_version="0",
)
MB = 1e6


def synthetic_rows(number: int, n_rows: int) -> pa.Table:
    """Batch `number` of the rows, the same in every process."""
    rng = np.random.default_rng([SEED, number])
    keys, prompts = (
        pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), n_rows, [None, pa.py_buffer(rng.bytes(16 * n_rows))])
        for _ in range(2)
    )
    lengths = rng.integers(16, 49, n_rows, dtype=np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    logps = -rng.standard_exponential(offsets[-1], dtype=np.float32)
    columns = [
        keys,
        prompts,
        np.full(n_rows, 100, np.int32),
        lengths,
        np.add.reduceat(logps.astype(np.float64), offsets[:-1]),
        pa.ListArray.from_arrays(offsets, rng.integers(0, 50_000, offsets[-1], dtype=np.int32)),
        pa.ListArray.from_arrays(offsets, logps),
    ]
    return pa.table([pa.array(column) for column in columns], schema=LOGPS_SCHEMA)


def frames(n_rows: int) -> Iterator[pa.Table]:
    for number, start in enumerate(range(0, n_rows, FRAME_ROWS)):
        yield synthetic_rows(number, min(FRAME_ROWS, n_rows - start))


class Place:
    """The folder of one size."""

    def __init__(self, root: Path, n_rows: int) -> None:
        self.n_rows = n_rows
        self.pairs, self.journal = root / "pairs.parquet", root / "journal"
        self.logps, self.views, self.scratch = root / "logps", root / "views", root / "scratch"

    def reference(self) -> Reference:
        return open_reference(self.logps, expect=IDENTITY)


def write(place: Place) -> dict[str, float]:
    """Append to the journal; seconds are those of the appends, not of making rows up."""
    schema = pa.schema([(name, pa.binary(16)) for name in PAIR_COLUMNS])
    seconds = 0.0
    with Journal(place.journal) as journal, pq.ParquetWriter(place.pairs, schema) as pairs:
        for rows in frames(place.n_rows):
            started = time.perf_counter()
            journal.append(rows)
            seconds += time.perf_counter() - started
            sides = [rows["response_key"].take(np.arange(side, rows.num_rows, 2)) for side in (0, 1)]
            pairs.write_table(pa.table(sides, schema=schema))
    return {"seconds": seconds}


def publish(place: Place) -> dict[str, float]:
    """From the journal, every row; with reading the wanted keys and opening (checking) the journal."""
    keys = key_batches(place.pairs, PAIR_COLUMNS)
    with Journal(place.journal) as journal:
        assert publish_rows(place.logps, keys, [journal], IDENTITY, scratch=place.scratch).n_rows == place.n_rows
    return {}


def open_it(place: Place) -> dict[str, float]:
    assert place.reference().n_rows == place.n_rows
    return {}


def coverage(place: Place) -> dict[str, float]:
    require_keys(place.reference(), key_batches(place.pairs, PAIR_COLUMNS), scratch=place.scratch)
    return {}


def join(place: Place) -> dict[str, float]:
    sums = join_sum_logps(place.reference(), key_batches(place.pairs, PAIR_COLUMNS), scratch=place.scratch)
    assert sums.shape == (place.n_rows // 2, 2) and (sums < 0).all()
    return {}


def build_view(place: Place) -> dict[str, float]:
    open_view(place.reference(), place.views)
    return {}


def shuffled(place: Place) -> dict[str, float]:
    """Every token of shuffled batches is copied into one array per batch, as a collator would."""
    view = open_view(place.reference(), place.views)
    started, rows, tokens = time.perf_counter(), 0, 0
    for keys, batch in view.shuffled(BATCH_ROWS, seed=1):
        ids, logps = np.concatenate(batch.token_ids), np.concatenate(batch.token_logps)
        assert len(ids) == len(logps) == batch.n_tokens.sum()
        rows, tokens = rows + len(keys), tokens + len(ids)
        if time.perf_counter() - started > EPOCH_SECONDS:
            break
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "rows": rows, "tokens_per_second": tokens / seconds}


def shuffled_cold(place: Place) -> dict[str, float]:
    """With the view's files dropped from the page cache."""
    for path in open_view(place.reference(), place.views).path.iterdir():
        evict(path)
    return shuffled(place)


def evict(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


OPERATIONS: dict[str, Callable[[Place], dict[str, float]]] = {
    "import only": lambda place: {"rows": 0},
    "write (journal append)": write,
    "publish": publish,
    "open": open_it,
    "coverage check": coverage,
    "join for training": join,
    "view build": build_view,
    "shuffled batches, cold": shuffled_cold,
    "shuffled batches, warm": shuffled,
}


def child(operation: str, root: Path, n_rows: int) -> None:
    """Run one operation and print its figures."""
    started, cpu = time.perf_counter(), time.process_time()
    figures = OPERATIONS[operation](Place(root, n_rows))
    figures = {"seconds": time.perf_counter() - started, "rows": n_rows} | figures
    print(json.dumps(figures | {"cpu": time.process_time() - cpu, "peak_rss": 1024 * status_kib("self", "VmHWM")}))


def status_kib(process: int | str, field: str) -> int:
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    return 0  # it has ended


def measure(operation: str, root: Path, n_rows: int) -> dict[str, Any]:
    """One operation in a fresh process: its figures, with the peak of its anonymous memory in bytes."""
    command = [sys.executable, __file__, "--child", operation, "--work", str(root), "--rows", str(n_rows)]
    peak = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            try:
                peak = max(peak, status_kib(process.pid, "RssAnon"))
            except FileNotFoundError:
                break
            time.sleep(0.005)
        assert process.stdout is not None
        output = process.stdout.read()
    if process.returncode:
        raise SystemExit(f"{operation} with {n_rows} rows ended with exit code {process.returncode}")
    return json.loads(output) | {"peak_anonymous": 1024 * peak}


def measure_size(root: Path, n_rows: int, operations: list[str]) -> dict[str, Any]:
    root.mkdir(parents=True)
    try:
        found: dict[str, Any] = {}
        for operation in operations:
            found[operation] = measure(operation, root, n_rows)
            print(f"{n_rows:,} rows, {operation}: {found[operation]}", file=sys.stderr)
        found["bytes"] = {part.name: size_of(part) for part in sorted(root.iterdir())}
        return found
    finally:
        shutil.rmtree(root)


def report(results: dict[int, Any], machine: str) -> str:
    largest, shown = results[max(results)], partial(table, results, list(OPERATIONS), "rows")
    sizes = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in largest["bytes"].items())
    rates = [
        f"- {name.capitalize()}: "
        + ", ".join(f"{found[name]['tokens_per_second']:,.0f}" for found in results.values())
        + " response tokens/s."
        for name in largest
        if "tokens_per_second" in largest[name]
    ]
    return "\n".join(
        [
            "# Scale of the store\n",
            f"`python benchmarks/store_scale.py --rows {' '.join(map(str, results))}`, on {machine}.",
            "Synthetic rows with 16 to 48 response tokens; every operation in a fresh process that also opens what it",
            "needs. Every row is asked for once by the pairs, of which there are half as many.\n",
            shown("seconds (rows/s)", lambda f: f"{f['seconds']:.2f} ({f['rows'] / f['seconds']:,.0f})"),
            "CPU seconds (of both cores together; with making the rows up, for write) are those that other work on the",
            "machine does not stretch.\n",
            shown("CPU seconds", lambda f: f"{f['cpu']:.2f}"),
            "Anonymous memory is what the process allocated itself; resident memory has pages of mapped files, too.\n",
            shown("peak anonymous MB", lambda f: f"{f['peak_anonymous'] / MB:,.0f}"),
            shown("peak resident MB", lambda f: f"{f['peak_rss'] / MB:,.0f}"),
            *rates,
            f"- On disk at {max(results):,} rows: {sizes}.",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[500_000, 2_000_000, 5_000_000], help="even numbers")
    parser.add_argument("--out", type=Path, help="write the report to this Markdown file, too")
    parser.add_argument("--work", type=Path, default=ROOT / ".refcache" / "store-scale", help="emptied afterwards")
    parser.add_argument("--machine", default="2 cores, 24 GB", help="for the report")
    parser.add_argument("--child", choices=list(OPERATIONS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.work, options.rows[0])
        return
    results = {n: measure_size(options.work / str(n), n, list(OPERATIONS)) for n in options.rows}
    text = report(results, options.machine) + "\n"
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text)


if __name__ == "__main__":
    main()
