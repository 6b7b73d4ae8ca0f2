"""The process that asks math-verify: it may die of an answer, and the next question is answered all the same."""

import resource
import subprocess
import time

import pytest

from pipeline.errors import RunFailed
from pipeline.sampled.math_equality import MathEquality

# One operation, within which Python handles no signal; a minute of it where nothing ends the process.
SLOW = """
def parse(text, **settings):
    return sum(range(5 * 10**9)) if "slow" in text else text

def verify(gold, found, **settings):
    return gold.lower() == found.lower()
"""


@pytest.mark.slow
def test_an_answer_that_takes_too_long_is_wrong_and_costs_itself_alone(tmp_path, monkeypatch):
    (tmp_path / "math_verify.py").write_text(SLOW)
    monkeypatch.syspath_prepend(tmp_path)
    with MathEquality(seconds=1) as equal:
        assert equal("Yes", "yes")
        started = time.monotonic()
        assert not equal("slow", "SLOW")
        assert time.monotonic() - started < 8
        assert equal("No", "no")


@pytest.mark.slow
def test_an_answer_may_not_take_the_machines_memory():
    with MathEquality() as equal:
        equal("1.0", "1")
        assert equal._process is not None
        assert resource.prlimit(equal._process.pid, resource.RLIMIT_AS)[0] == 2 << 30


def test_equal_answers_are_equal_without_a_process(monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)
    with MathEquality() as equal:
        assert equal("yes", "yes")


@pytest.mark.slow
def test_each_question_is_asked_once(monkeypatch):
    with MathEquality() as equal:
        assert [equal("1.0", "1"), equal("2", "1")] == [True, False]
        monkeypatch.setattr(equal, "_ask", None)
        assert [equal("1.0", "1"), equal("2", "1")] == [True, False]


@pytest.mark.slow
def test_no_process_is_left():
    with MathEquality() as equal:
        equal("1.0", "1")
        process = equal._process
        assert process is not None and process.poll() is None
    assert process.poll() is not None


def test_a_package_that_can_not_be_loaded_is_told(tmp_path, monkeypatch):
    (tmp_path / "math_verify.py").write_text("raise ImportError('no antlr of that version')")
    monkeypatch.syspath_prepend(tmp_path)
    with MathEquality() as equal, pytest.raises(RunFailed, match=r"ended with code 1 .*pip install -e \.\[sample\]"):
        equal("1.0", "1")
