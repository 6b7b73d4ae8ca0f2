"""The GPU suite keeps what it has measured whatever happens to it, and all of it runs on a CPU at tiny sizes."""

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import running
from benchmarks.gpu.inputs import draw_prompts
from benchmarks.gpu.lengths import DATA, read_lengths
from benchmarks.gpu.running import Part, Suite
from benchmarks.gpu.summary import best, write_summary
from tests import ROOT

pytestmark = pytest.mark.slow

RESULT = 'print(\'{"case": "found", "value": 1}\', flush=True)'
WELL = f"{RESULT}; print('chatter of a library')"
FOR_EVER = "import threading; threading.Event().wait()"
# The suite as a process, of parts that are given as (name, code, seconds).
PROGRAM = """
import json, sys
from pathlib import Path
from benchmarks.gpu import running
from benchmarks.gpu.running import Part, Suite
from benchmarks.gpu.summary import write_summary
running.LEAST = 1.0
out = Path(sys.argv[1])
parts = [Part(name, ["-c", code], limit, 0) for name, code, limit in json.loads(sys.argv[2])]
suite = Suite(out, seconds=600, environment={})
summarise = lambda records: (out / "summary.md").write_text(write_summary(records, dry_run=False))
raise SystemExit(suite.run(parts, summarise))
"""


def start(out: Path, *parts: tuple[str, str, float]) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, str(out), json.dumps(parts)]
    return subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True
    )


def records(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_cut_off_in_the_middle_it_leaves_what_was_measured_and_no_process(tmp_path, number):
    pid = 'import os; print(\'{"case": "found", "value": %d}\' % os.getpid(), flush=True)'
    suite = start(tmp_path, ("first", WELL, 60), ("second", f"{pid}; {FOR_EVER}", 60), ("third", WELL, 60))
    said = [json.loads(suite.stdout.readline()) for _ in range(3)]
    assert [(r["part"], r["case"]) for r in said] == [("first", "found"), ("first", "ended"), ("second", "found")]
    part = os.pidfd_open(said[2]["value"])
    suite.send_signal(number)
    rest = [json.loads(line) for line in suite.stdout]  # to the end: the part holds this pipe no more, either
    suite.wait()
    assert records(tmp_path) == said + rest
    summary = (tmp_path / "summary.md").read_text()
    assert "| first | done |" in summary and "third" not in summary
    if number == signal.SIGTERM:
        assert [(r["part"], r["status"]) for r in rest] == [("second", "cut off")]
        assert suite.returncode == 143 and "| second | cut off |" in summary
    assert select.select([part], [], [], 60)[0] == [part]  # it has ended
    os.close(part)


def test_a_part_that_fails_or_hangs_costs_itself_alone(tmp_path):
    parts = [
        ("breaks", f"{RESULT}; raise ValueError('no such kernel')", 60),
        ("dies", "import os; os.kill(os.getpid(), 11)", 60),
        ("hangs", f"{RESULT}; {FOR_EVER}", 3),
        ("works", WELL, 60),
    ]
    suite = start(tmp_path, *parts)
    suite.communicate()
    found = records(tmp_path)
    ended = {r["part"]: r["status"] for r in found if r["case"] == "ended"}
    assert ended == {"breaks": "failed", "dies": "failed", "hangs": "timed out", "works": "done"}
    assert [r["part"] for r in found if r["case"] == "found"] == ["breaks", "hangs", "works"]
    assert suite.returncode == 1
    assert "ValueError: no such kernel" in (tmp_path / "summary.md").read_text()
    assert "chatter of a library" in (tmp_path / "suite.log").read_text()


def test_earlier_parts_leave_later_ones_their_reserve(tmp_path, monkeypatch):
    monkeypatch.setattr(running, "LEAST", 1.0)
    parts = [Part("long", ["-c", FOR_EVER], 600, 0), Part("later", ["-c", WELL], 600, 9)]
    suite = Suite(tmp_path, seconds=16, environment={})
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        status = suite.run(parts, lambda records: None)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    ended = {r["part"]: r["status"] for r in suite.records if r["case"] == "ended"}
    assert ended == {"long": "timed out", "later": "done"} and status == 1


def training(contender, speed, peak, *, data="ultrafeedback", fits=True):
    measured = {"pair_tokens_per_second": speed, "peak_bytes": peak}
    measured |= {"warm_up_seconds": [1.0], "losses": [0.69, 0.68]}
    setting = {"setting": {"size": speed}, "part": "train"}
    return (
        {"case": "training", "contender": contender, "data": data, "fits": fits} | setting | (measured if fits else {})
    )


def test_of_settings_that_are_nearly_as_fast_the_leanest_counts_for_everybody():
    found = [training("trl", 100, 8 << 30), training("trl", 97, 4 << 30), training("trl", 50, 1 << 30)]
    found += [training("trl", 0, 0, fits=False), training("refcache", 240, 2 << 30)]
    assert best(found, "ultrafeedback", "trl") == found[1]
    summary = write_summary(found, dry_run=False)
    assert "| >= 2.5 | 2.47 | no |" in summary and "| <= 0.5 | 0.50 | **yes** |" in summary
    assert "| >= 5.0 | not measured |" in summary


def test_what_is_drawn_of_the_quantiles_has_as_many_pairs_as_asked_and_their_lengths():
    import numpy as np

    for data in DATA:
        table = read_lengths(data)
        totals = [prompt.pair_tokens for prompt in table]
        assert totals == sorted(totals)
        assert all(prompt.prompt + max(*prompt.chosen, *prompt.rejected) <= 1024 for prompt in table)
        drawn = draw_prompts(table, 300, np.random.default_rng(1))
        pairs = [len(prompt.chosen) * len(prompt.rejected) for prompt in drawn]
        assert sum(pairs) == 300
        mean = sum(totals) / sum(len(prompt.chosen) * len(prompt.rejected) for prompt in table)
        assert sum(prompt.pair_tokens for prompt in drawn) / 300 == pytest.approx(mean, rel=0.15)


def test_every_part_runs_on_a_cpu_at_tiny_sizes(tmp_path):
    command = [sys.executable, "benchmarks/gpu_suite.py", "--dry-run", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    found = records(tmp_path)
    ended = {r["part"]: (r["status"], r["error"]) for r in found if r["case"] == "ended"}
    assert done.returncode == 0, ended
    assert {status for status, _ in ended.values()} <= {"done", "skipped"}
    assert ended.keys() >= {"inputs", "train/plain", "train/auto", "kernels", "tests", "sketch", "auxdpo"}
    trained = [r for r in found if r["case"] == "training"]
    # The reference is the policy at its start.
    first = {(r["part"], r["data"]): r["losses"][0] for r in reversed(trained)}
    assert len(first) >= 4 and list(first.values()) == pytest.approx([0.6931] * len(first), abs=1e-3)
    assert any(r["case"] == "test" and r["outcome"] == "skipped" for r in found)
    errors = [r for r in found if r["case"] == "kernels" and r["dtype"] == "float32"]
    assert errors and all(r["hidden_states_off"] < 1e-5 for r in errors)
    assert any(r["case"] == "auxdpo" and "of_dpo" in r for r in found)
    assert "A dry run" in done.stdout and (tmp_path / "summary.md").read_text() in done.stdout
