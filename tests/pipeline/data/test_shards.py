"""Several processes write the tables of one, and end as one would."""

import json
import subprocess
import sys
from dataclasses import asdict

import pyarrow as pa
import pytest

from pipeline.data import shards
from pipeline.data.pairing import BATCH_ROWS
from pipeline.data.shards import Shard, elsewhere, ranges
from pipeline.data.tables import SFT_SCHEMA, TableWriter, write_table
from pipeline.errors import RequestError, RunFailed
from pipeline.params import ModelParams
from tests import ROOT
from tests.pipeline.data import chat_tokenizers
from tests.pipeline.data.preparing import digests, file_params, pair_rows, prepare_into, write_jsonl


@pytest.mark.parametrize("rows", [0, 1, 3999, 4000, 8000, 12_345, 1_000_000])
@pytest.mark.parametrize("processes", [1, 2, 3, 64])
def test_runs_are_whole_batches_that_cover_all_rows(rows, processes):
    runs = ranges(rows, processes)
    assert runs[0][0] == 0 and runs[-1][1] is None and len(runs) <= processes
    assert [last for _, last in runs[:-1]] == [first for first, _ in runs[1:]]
    assert all(first % BATCH_ROWS == 0 for first, _ in runs)
    assert len(runs) == 1 or all(last - first >= BATCH_ROWS for first, last in runs[:-1])


@pytest.fixture
def model(tmp_path):
    chat_tokenizers.plain().save_pretrained(tmp_path / "model")
    return ModelParams(name=str(tmp_path / "model"))


@pytest.fixture
def processes(monkeypatch):
    monkeypatch.setattr(shards, "FEWEST_ROWS", BATCH_ROWS)
    monkeypatch.setattr(shards, "LEAD_ROWS", 0)
    return lambda count: monkeypatch.setattr("pipeline.data.prepare.usable_processes", lambda: count)


@pytest.mark.slow
@pytest.mark.parametrize("feedback", [True, False])
def test_the_number_of_processes_changes_no_byte(tmp_path, model, processes, capsys, feedback):
    """With bad rows, prompts that are too long, repeated pairs, prompts of both splits, feedback and rewards."""
    rows = pair_rows(1700)
    for n in range(0, 1700, 50):
        rows[n] = rows[n + 7] | {"chosen_reward": 1.0, "rejected_reward": n % 3, "category": f"c{n % 4}"}
    rows[3]["chosen"], rows[900]["chosen"], rows[1650]["prompt"] = "", rows[900]["rejected"], "long " * 40
    rows[1100] = {"question": "?", "better": "a"}
    write_jsonl(tmp_path / "in/pairs.jsonl", rows[:1400])
    write_jsonl(tmp_path / "in/more.jsonl", rows[1400:])
    write_jsonl(tmp_path / "in/test.jsonl", [rows[20], *pair_rows(40, start=5000)])
    files = {"pairs": ["pairs.jsonl", "more.jsonl"], "test_pairs": ["test.jsonl"]}
    params = file_params(
        tmp_path / "in",
        files=files,
        sft={"source": "pairs"},
        feedback=feedback,
        max_prompt_tokens=100,
        on_bad_row="skip",
    )
    found = []
    for count in (1, 3):
        processes(count)
        prepare_into(tmp_path / str(count), params, model)
        found.append((digests(tmp_path / str(count)), capsys.readouterr().err))
    assert found[0] == found[1]
    summary = json.loads((tmp_path / "3/summary.json").read_text())
    assert summary["skipped_rows"]["count"] == 3 and summary["dropped_prompts_too_long"] == 1
    assert summary["train_prompts_also_in_test"] > 0 < summary["duplicate_pairs"]
    assert not list((tmp_path / "3").glob(".*"))


@pytest.mark.slow
def test_what_a_process_refuses_is_refused(tmp_path, model, processes):
    rows = [*pair_rows(1200), {"prompt": [{"role": "user", "content": "?"}], "chosen": "a", "rejected": "b"}]
    write_jsonl(tmp_path / "in/pairs.jsonl", rows)
    processes(2)
    with pytest.raises(RequestError, match=r"pairs\.jsonl:1201: .*no chat template"):
        prepare_into(tmp_path / "out", file_params(tmp_path / "in", sft={"source": "none"}), model)
    assert not (tmp_path / "out").exists()


def order(tmp_path, model, **changes):
    params = file_params(tmp_path / "in", sft={"source": "none"}).model_dump()
    shard = Shard(params, model.name, False, False, True, str(tmp_path / "spool"), 1, 0, None)
    return Shard(**asdict(shard) | changes)


@pytest.mark.slow
def test_a_process_that_dies_ends_the_run_with_what_it_said(tmp_path, model):
    with (
        elsewhere([order(tmp_path, model, params={"source": "nowhere"})]) as [process],
        pytest.raises(RunFailed, match=r"ended with 1; nothing was written.*nowhere"),
    ):
        process.tally()


@pytest.mark.slow
def test_a_process_ends_with_whoever_started_it(tmp_path, model):
    write_jsonl(tmp_path / "in/pairs.jsonl", pair_rows(10))
    words = json.dumps(asdict(order(tmp_path, model)))
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.data.shards"], input=words + "\n", cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1 and not done.stdout  # stdin has ended: nobody waits for an answer


def test_a_table_has_the_same_bytes_however_its_rows_came(tmp_path):
    rows = [
        {"prompt_ids": [n], "response_ids": [n, n], "prompt_text": str(n), "response_text": "x" * (n % 9)}
        for n in range(5003)
    ]
    table = pa.Table.from_pylist(rows, SFT_SCHEMA)
    write_table(table, tmp_path / "whole", SFT_SCHEMA)
    with TableWriter(tmp_path / "pieces", SFT_SCHEMA) as writer:
        for start, length in ((0, 1), (1, 2500), (2501, 0), (2501, 2502)):
            writer.write(table.slice(start, length))
    assert (tmp_path / "pieces").read_bytes() == (tmp_path / "whole").read_bytes()
