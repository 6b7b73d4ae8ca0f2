"""Rows encoded by several processes, each a run of them; the same tables come out, however many there are.

A process is started as `python -m pipeline.data.shards`, gets its order as JSON on stdin, writes a spool and answers
with its tally as JSON on stdout. Its stdin stays open: when that ends, whoever gave the order is gone, and so is it.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.children import same_path_environment
from pipeline.data.counting import Tally
from pipeline.data.inputs import Inputs
from pipeline.data.pairing import BATCH_ROWS, PairStream
from pipeline.data.spool import PairSpool
from pipeline.encoding.encoder import Encoder, Limits
from pipeline.encoding.words import WordsDisagree
from pipeline.errors import RequestError, RunFailed
from pipeline.model.tokenizer import open_tokenizer
from pipeline.params import PrepareParams
from pipeline.progress import Advance

FEWEST_ROWS = 4000  # of one process
# Arrow's own allocator keeps what was freed, half as much again as is in use. Read when pyarrow is imported.
PLAIN_MEMORY = {"ARROW_DEFAULT_MEMORY_POOL": "system"}
MOST_PROCESSES = 8
LEAD_ROWS = 2000  # that this process is through with when the others have started


@dataclass(frozen=True)
class Shard:
    """A run of input rows and where they are spooled to."""

    params: dict[str, Any]  # PrepareParams
    tokenizer: str  # folder, with the chat template
    trust_remote_code: bool
    chat: bool
    words: bool  # encoding/words.py
    folder: str
    partitions: int  # of its spool
    first: int
    last: int | None  # None: to the end


def encoder_for(params: PrepareParams, tokenizer: Any, *, chat: bool, words: bool) -> Encoder:
    limits = Limits(params.max_tokens, params.max_prompt_tokens, params.long_prompts)
    return Encoder(tokenizer, chat=chat, limits=limits, after_end=params.after_end, words=words)


def ranges(rows: int, processes: int) -> list[tuple[int, int | None]]:
    """Runs of whole batches, about equally long; rows: about how many there are."""
    count = max(1, min(processes, rows // FEWEST_ROWS))
    share = (rows - LEAD_ROWS) // count
    bounds = [0] + [(LEAD_ROWS + place * share) // BATCH_ROWS * BATCH_ROWS for place in range(1, count)]
    return list(zip(bounds, [*bounds[1:], None], strict=True))


def usable_processes() -> int:
    """One a core; each takes a quarter of a gigabyte, hence a bound."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST_PROCESSES)


def encode_here(inputs: Inputs, encoder: Encoder, params: PrepareParams, shard: Shard, advance: Advance) -> Tally:
    spool = PairSpool(Path(shard.folder), shard.partitions)
    tally = PairStream(inputs, encoder, params).spool(spool, shard.first, shard.last, advance)
    spool.finish()
    return tally


@contextmanager
def elsewhere(shards: list[Shard]) -> Iterator[list["_Process"]]:
    """These shards in processes of their own, which end with the block."""
    started: list[_Process] = []
    try:
        for shard in shards:
            started.append(_Process(shard))
        yield started
    finally:
        for process in started:
            process.end()


class _Process:
    def __init__(self, shard: Shard) -> None:
        self._log = Path(f"{shard.folder}.log")
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "pipeline.data.shards"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=same_path_environment() | PLAIN_MEMORY,
            )
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asdict(shard)).encode() + b"\n")
        self._process.stdin.flush()

    def tally(self) -> Tally:
        """Waits. Raises what the process met, RequestError or WordsDisagree; RunFailed where it gave no answer."""
        assert self._process.stdout is not None
        answer = self._process.stdout.read()
        if not answer:
            said = self._log.read_text(errors="replace").strip().splitlines()[-5:]
            code = self._process.wait()
            raise RunFailed(f"a process of prepare ended with {code}; nothing was written. It said: {' / '.join(said)}")
        found = json.loads(answer)
        if "refused" in found:
            raise RequestError(found["refused"])
        if "disagreed" in found:
            raise WordsDisagree(found["disagreed"])
        return Tally.of_json(found)

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


def _end_with_stdin() -> None:
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)


def main() -> None:
    shard = Shard(**json.loads(sys.stdin.buffer.readline()))
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    params = PrepareParams.model_validate(shard.params)
    try:
        tokenizer = open_tokenizer(Path(shard.tokenizer), trust_remote_code=shard.trust_remote_code)
        inputs = Inputs(params, chat=shard.chat)
        encoder = encoder_for(params, tokenizer, chat=shard.chat, words=shard.words)
        answer = encode_here(inputs, encoder, params, shard, lambda *_: None).to_json()
    except RequestError as error:
        answer = {"refused": str(error)}
    except WordsDisagree as error:
        answer = {"disagreed": str(error)}
    sys.stdout.write(json.dumps(answer))
    sys.stdout.flush()
    os._exit(0)  # the thread above waits for ever


if __name__ == "__main__":
    main()
