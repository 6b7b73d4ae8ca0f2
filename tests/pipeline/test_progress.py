"""Progress without a terminal: silent at first, then one plain line now and then."""

import pytest

from pipeline import progress


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_quick_work_says_nothing(clock, capfd):
    with progress.progress_bar("score", 3, tokens=30) as advance:
        for _ in range(3):
            clock[0] += 5
            advance(1, 10)
    assert capfd.readouterr() == ("", "")


def test_long_work_says_how_far_it_is_and_how_long_it_will_take(clock, capfd):
    with progress.progress_bar("score", 1000, tokens=4000) as advance:
        clock[0] += 31
        advance(100, 1000)
        clock[0] += 31
        advance(400, 1000)
    out, err = capfd.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "score: 100/1,000 rows  32 tokens/s, about 1 min 33 s left",  # a quarter of the tokens in 31 s
        "score: 500/1,000 rows  32 tokens/s, about 1 min 2 s left",
    ]


def test_without_tokens_rows_are_counted(clock, capfd):
    with progress.progress_bar("tokenise", 10) as advance:
        clock[0] += 40
        advance(5)
    assert capfd.readouterr().err == "tokenise: 5/10 rows  0.1 rows/s, about 40 s left\n"
