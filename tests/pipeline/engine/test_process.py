"""The process that owns the engine: its end, in every way, is noticed. vLLM is not loaded here."""

import os
import select
import signal
import subprocess
import sys
import time

import pytest

from pipeline.engine.environment import engine_environment
from pipeline.engine.process import EngineProcess, orderly_termination
from pipeline.engine.rows import EngineLength
from pipeline.errors import RunFailed
from pipeline.params import ScoreParams

PARAMS = ScoreParams(timeout_seconds=1)
LENGTH = EngineLength(16, beyond_limit=False)


def ended(pid, within=20.0):
    """Whether the process ends in time; a zombie has ended."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], within)[0])
    finally:
        os.close(descriptor)


@pytest.mark.slow
def test_a_silent_engine_is_given_up_after_the_timeout(tmp_path):
    with EngineProcess(PARAMS, log=tmp_path / "engine.log") as engine:
        os.kill(engine.pid, signal.SIGSTOP)
        started = time.monotonic()
        with pytest.raises(RunFailed, match=r"no sign of life for 1 s \(score.timeout_seconds\)") as failed:
            engine.load(tmp_path, LENGTH)
        assert time.monotonic() - started < 10
        assert str(tmp_path / "engine.log") in str(failed.value)
        assert ended(engine.pid)


def test_a_killed_engine_is_reported_with_its_log(tmp_path):
    with EngineProcess(PARAMS, log=tmp_path / "engine.log") as engine:
        (tmp_path / "engine.log").write_text("\n".join(f"line {n}" for n in range(40)))
        os.kill(engine.pid, signal.SIGKILL)
        with pytest.raises(RunFailed) as failed:
            engine.load(tmp_path, LENGTH)
    message = str(failed.value)
    assert "did not start" in message and "killed by signal 9" in message
    assert str(tmp_path / "engine.log") in message and "line 39" in message and "line 5\n" not in message
    assert "run the same command again" in message


def test_an_engine_that_is_never_loaded_ends_with_its_block(tmp_path):
    with pytest.raises(KeyError), EngineProcess(PARAMS, log=tmp_path / "engine.log") as engine:
        raise KeyError
    assert ended(engine.pid)


DOOMED_STAGE = """
import os, signal, sys
from pathlib import Path
from pipeline.engine.process import EngineProcess
from pipeline.params import ScoreParams
engine = EngineProcess(ScoreParams(), log=Path(sys.argv[1]))
print(engine.pid, flush=True)
engine._pipe.poll(0.5)  # time to begin
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_the_engine_dies_with_a_killed_stage(tmp_path):
    log = tmp_path / "engine.log"
    stage = subprocess.run([sys.executable, "-c", DOOMED_STAGE, str(log)], capture_output=True, text=True)
    assert stage.returncode == -signal.SIGKILL, stage.stderr
    assert ended(int(stage.stdout))


def test_the_environment_is_set_before_the_engine_starts(monkeypatch):
    for name in os.environ:
        if name.startswith(("MALLOC_", "GOMP_", "VLLM_", "TORCHDYNAMO_")) or name == "DO_NOT_TRACK":
            monkeypatch.delenv(name)
    before = dict(os.environ)
    found = engine_environment(ScoreParams(cpu_kv_cache_gib=3))
    assert found["MALLOC_MMAP_MAX_"] == "0" and found["MALLOC_TRIM_THRESHOLD_"] == "17179869184"
    assert found["GOMP_SPINCOUNT"] == "1000"
    assert found["VLLM_CPU_KVCACHE_SPACE"] == "3" and found["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert found["VLLM_NO_USAGE_STATS"] == found["DO_NOT_TRACK"] == "1"
    assert "TORCHDYNAMO_DISABLE" not in found
    assert engine_environment(ScoreParams(enforce_eager=True))["TORCHDYNAMO_DISABLE"] == "1"
    assert dict(os.environ) == before


def test_what_the_user_has_set_stays(monkeypatch):
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "65536")
    assert engine_environment(ScoreParams())["MALLOC_MMAP_MAX_"] == "65536"


def test_sigterm_unwinds_the_stage():
    before = signal.getsignal(signal.SIGTERM)
    unwound = []
    with pytest.raises(SystemExit) as left, orderly_termination():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.sigtimedwait([], 5)  # interrupted by the handler
        finally:
            unwound.append(True)
    assert left.value.code == 143 and unwound
    assert signal.getsignal(signal.SIGTERM) == before
