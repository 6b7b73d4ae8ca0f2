"""Bad rows and dying engines: what they cost, what is said, and what stays.

The engine's process, pipe and deaths are real; in it a stand-in for vLLM answers (tests/stand_in), so that it starts in
a second. The same with vLLM itself is in tests/integration/test_kills.py.
"""

import json
import os
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from cache import open_reference, response_key
from pipeline.engine import pool
from pipeline.engine.process import EngineProcess
from pipeline.errors import EngineFailed, RequestError, RunFailed
from pipeline.reference import scoring
from tests import stand_in
from tests.scoring_project import ScoringProject, write_prepared
from tests.tiny import POSITIONS, write_model
from tests.tiny_reference import adversarial_rows

POISON, STUCK, VOCABULARY = 63, 62, 64


def row(prompt, response):
    return np.array(prompt, np.int32), np.array(response, np.int32)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def place(tmp_path, model, monkeypatch):
    """Rows that nothing is wrong with, at most six a call."""
    good = [(prompt, np.minimum(response, 60)) for prompt, response in adversarial_rows()]
    place = ScoringProject(tmp_path, model, list({response_key(*row): row for row in good}.values()))
    place.asked = tmp_path / "asked"
    wish = {"asked": str(place.asked), "poison": POISON, "stuck": STUCK, "unready": str(tmp_path / "unready")}
    for name, value in stand_in.environment(wish).items():
        monkeypatch.setenv(name, value)
    return place


def asked(place):
    """How often each row reached an engine, by key; the calls in order."""
    calls = [[response_key(*row) for row in json.loads(line)] for line in place.asked.read_text().splitlines()]
    keys = [key for call in calls for key in call]
    return {key: keys.count(key) for key in keys}, calls


# rows that the model can't take ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_bad_rows_are_named_with_their_lines_and_cost_the_others_nothing(place, capsys):
    place.score()
    published = place.contents()
    too_long, foreign, empty = row([3] * POSITIONS, [4]), row(place.rows[0][0], [5, VOCABULARY]), row([7], [])
    good = [row([9, 10], [11]), row([9, 10], [12, 13])]
    grown = write_prepared(place.root / "grown", [foreign, *place.rows, *good, too_long, empty])
    capsys.readouterr()
    with pytest.raises(RequestError) as refused:
        place.score(grown)
    at_once, message = capsys.readouterr().err, str(refused.value)
    for said in (at_once, message):
        assert f"Response {response_key(*foreign).hex()} (rows:" in said and "has token id 64, but" in said
        assert f"Response {response_key(*too_long).hex()} (of no pair) has {POSITIONS + 1} tokens" in said
        assert f"Response {response_key(*empty).hex()} (of no pair) has no response token" in said
    assert f"3 of {len(place.rows) + 5} responses can't be scored" in message
    assert f"Set prepare.max_tokens to {POSITIONS} or less" in message
    assert place.contents() == published
    assert {response_key(*row) for row in good} <= place.journalled()

    again = place.score(write_prepared(place.root / "mended", [*place.rows, *good]))
    assert again["rows_scored"] == 0
    assert set(asked(place)[0].values()) == {1}


@pytest.mark.slow
def test_bad_rows_alone_are_refused_before_the_model_loads(place, monkeypatch):
    monkeypatch.setattr(EngineProcess, "load", lambda *args, **kwargs: pytest.fail("the model was loaded"))
    bad = [row([3], [VOCABULARY, number]) for number in range(25)]
    with pytest.raises(RequestError, match="25 of 25 responses") as refused:
        place.score(write_prepared(place.root / "bad", bad))
    listed = Path(str(refused.value).split("All are listed in ")[1].split(".tsv")[0] + ".tsv")
    lines = [line.split("\t") for line in listed.read_text().splitlines()]
    assert {line[0] for line in lines[1:]} == {response_key(*row).hex() for row in bad}
    assert lines[1][1].startswith("rows:")
    assert not place.out.exists() and not place.metrics.exists()


# engines that die -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_rows_that_end_or_stop_engines_are_set_aside_after_three_and_the_others_are_answered(
    place, monkeypatch, capsys
):
    poison, stuck = row(place.rows[-1][0], [5, POISON]), row(place.rows[0][0], [5, 6, STUCK])
    rows = [stuck, *place.rows, poison]
    shown, score = [0, 0], EngineProcess.score

    @contextmanager
    def counting_bar(title, rows, *, tokens):
        def advance(rows, tokens=0, /):
            shown[0] += rows
            shown[1] += tokens

        yield advance

    def score_impatiently(self, rows, advance):
        self._params = self._params.model_copy(update={"timeout_seconds": 1})
        return score(self, rows, advance)

    monkeypatch.setattr(scoring, "progress_bar", counting_bar)
    monkeypatch.setattr(EngineProcess, "score", score_impatiently)
    with pytest.raises(RunFailed) as failed:
        place.score(write_prepared(place.root / "poisoned", rows))
    times, calls = asked(place)
    others = {response_key(*row) for row in place.rows}
    for bad in (poison, stuck):
        key = response_key(*bad)
        assert times[key] == 3
        assert [len(call) for call in calls if key in call][-1] == 1
        assert f"Response {key.hex()} (rows:" in str(failed.value)
    assert place.journalled() == others
    assert shown[0] == len(place.rows)  # what died with an engine was taken back
    assert shown[1] == sum(len(prompt) + len(response) for prompt, response in place.rows)
    logs = {file.name for file in (place.home / "logs").glob("score*.log")}
    assert {"score.log", *(f"score.{number}.log" for number in range(1, 6))} <= logs
    lines = capsys.readouterr().err.splitlines()
    assert len([line for line in lines if "died" in line or "no sign of life" in line or "killed by" in line]) == 6
    assert not place.out.exists()

    assert place.score()["rows_scored"] == 0
    assert max(asked(place)[0][key] for key in others) <= 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limit", "says"),
    [("DEATHS_WITHOUT_AN_ANSWER", "2 engines in a row died without an answer"), ("DEATHS_IN_ALL", "2 engines died in")],
)
def test_engines_that_go_on_dying_end_the_run(place, monkeypatch, limit, says):
    monkeypatch.setattr(pool, limit, 2)
    rows = [row([7], [number, POISON]) for number in range(3, 20)]
    with pytest.raises(RunFailed, match=says) as failed:
        place.score(write_prepared(place.root / "poisoned", rows))
    assert "score*.log" in str(failed.value) and "run the same command again" in str(failed.value)
    assert len(asked(place)[1]) == 2


@pytest.mark.slow
def test_the_call_of_a_killed_engine_is_asked_again_last_and_as_it_was(place, monkeypatch):
    """So that its numbers are the same to the last bit also where they depend on what else is in the call."""
    score, calls = EngineProcess.score, []

    def die_in_the_second(self, rows, advance):
        calls.append([response_key(*row) for row in rows])
        if len(calls) == 2:
            os.kill(self.pid, 9)
        return score(self, rows, advance)

    monkeypatch.setattr(EngineProcess, "score", die_in_the_second)
    place.score()
    assert len(calls) > 4 and calls[-1] == calls[1] and len(calls[1]) > 1
    assert sorted(key for call in calls for key in call) == sorted([response_key(*r) for r in place.rows] + calls[1])


@pytest.mark.slow
def test_a_dead_engine_that_cannot_be_replaced_ends_the_run_and_keeps_the_rows(place, monkeypatch):
    score, calls = EngineProcess.score, []

    def die_in_the_third(self, rows, advance):
        calls.append({response_key(*row) for row in rows})
        if len(calls) == 3:
            (place.root / "unready").touch()
            os.kill(self.pid, 9)
        return score(self, rows, advance)

    monkeypatch.setattr(EngineProcess, "score", die_in_the_third)
    with pytest.raises(EngineFailed, match=r"2 others could not take its place.*did not start.*not ready"):
        place.score()
    assert len(list((place.home / "logs").glob("score*.log"))) == 3
    assert place.journalled() == calls[0] | calls[1]
    with pytest.raises(EngineFailed, match="did not start"):  # a first engine gets no second chance
        place.score()
    assert [file.name for file in (place.home / "logs").glob("score*.log")] == ["score.log"]
    (place.root / "unready").unlink()
    assert place.score()["rows_scored"] == len(place.rows) - len(calls[0] | calls[1])
    assert open_reference(place.out, expect=None).n_rows == len(place.rows)
