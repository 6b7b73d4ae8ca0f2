"""Scoring with suites, by the real engine: the pairs' cache is the same as without, and nothing is asked twice."""

import json

import numpy as np
import pytest

from cache import open_reference, response_key, verify
from pipeline.data.suites import INDEX
from pipeline.engine import supervision
from pipeline.engine.process import EngineProcess
from pipeline.errors import RequestError
from tests.scoring_project import SKETCH, ScoringProject, write_prepared
from tests.tiny import POSITIONS, VOCABULARY, plain_logps, write_model
from tests.tiny_reference import adversarial_rows, quick_engine


def rows(seed, count, longest=40):
    random = np.random.default_rng(seed)

    def ids(most):
        return random.integers(3, VOCABULARY, random.integers(1, most)).astype(np.int32)

    found = []
    for _ in range(count):
        prompt = ids(longest)
        found += [(prompt, ids(20)) for _ in range(3)]
    return found


OWN = rows(0, 5)
NEW = rows(1, 4)
LONG = [adversarial_rows()[18]]  # fills all positions, so that the engine is built for longer rows than the pairs have


class Suites:
    """A folder of prepared suites beside a project's pairs."""

    def __init__(self, root, **suites):
        self.folder, self.out = root / "suites", root / "suites-logps"
        self.write(**suites)

    def write(self, **suites):
        for name, its_rows in suites.items():
            write_prepared(self.folder / name, its_rows)
        self.folder.mkdir(exist_ok=True)
        (self.folder / INDEX).write_text(json.dumps(list(suites)))

    @property
    def options(self):
        return {"suites": self.folder, "suites_out": self.out}


@pytest.fixture(scope="module", autouse=True)
def quick():
    with quick_engine():
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def place(tmp_path, model):
    return ScoringProject(tmp_path / "project", model, OWN)


@pytest.fixture
def asked(monkeypatch):
    """Keys of the rows that engines are asked, in order, by calls."""
    found = []
    score = EngineProcess.score

    def counted(self, rows, *rest, **named):
        found.append([response_key(*row) for row in rows])
        return score(self, rows, *rest, **named)

    monkeypatch.setattr(EngineProcess, "score", counted)
    return found


def keys(its_rows):
    return {response_key(*row) for row in its_rows}


@pytest.fixture(scope="module")
def alone(tmp_path_factory, model):
    """A run that knows of no suites."""
    project = ScoringProject(tmp_path_factory.mktemp("alone"), model, OWN)
    project.summary = project.score()
    return project


@pytest.mark.slow
def test_pairs_have_the_same_cache_with_and_without_suites_and_each_response_is_scored_once(alone, place, asked):
    suites = Suites(place.root, first=[*NEW, *OWN[:3]], second=[*NEW[3:], *LONG])
    summary = place.score(**suites.options)
    assert place.contents() == alone.contents()
    every = [key for call in asked for key in call]
    assert len(every) == len(set(every)) and set(every) == keys([*OWN, *NEW, *LONG])
    assert not any(set(call) & keys(OWN) and set(call) - keys(OWN) for call in asked)  # no call holds both
    assert summary["rows_scored"] == len(every) and summary["responses"] == len(OWN)
    assert summary["responses_of_suites_alone"] == len(keys(NEW + LONG) - keys(OWN))
    assert alone.summary["responses_of_suites_alone"] == 0

    cached = open_reference(suites.out, expect=open_reference(place.out, expect=None).identity)
    assert cached.keys() == keys([*NEW, *OWN[:3], *LONG]) and verify(suites.out) == []
    for prompt, response in [*NEW, *LONG]:
        expected = plain_logps(place.model, prompt.tolist(), response.tolist())
        row = cached.rows([response_key(prompt, response)]).row(0, named=True)
        np.testing.assert_allclose(row["token_logps"], expected, atol=1e-4)

    asked.clear()
    before = {path.name: path.read_bytes() for path in suites.out.iterdir()}
    assert place.score(**suites.options)["rows_scored"] == 0 and not asked
    assert {path.name: path.read_bytes() for path in suites.out.iterdir()} == before


@pytest.mark.slow
def test_a_suite_that_comes_later_costs_its_own_rows_and_changes_no_byte_of_the_pairs(place, asked, monkeypatch):
    suites = Suites(place.root)
    place.score(**suites.options)
    assert open_reference(suites.out, expect=None).n_rows == 0  # none, and DVC finds the folder
    before = place.contents()
    asked.clear()
    suites.write(late=[*NEW, OWN[0]])
    assert place.score(sketch=SKETCH, **suites.options)["rows_sketched"] == 0  # none of them trains
    assert {key for call in asked for key in call} == keys(NEW)
    assert place.contents() == before

    monkeypatch.setattr(supervision, "EngineProcess", None)  # nothing is left to score
    suites.write(late=NEW[:6])
    assert place.score(**suites.options)["rows_scored"] == 0
    assert open_reference(suites.out, expect=None).keys() == keys(NEW[:6])
    suites.write()
    assert place.score(**suites.options)["rows_scored"] == 0
    assert open_reference(suites.out, expect=None).n_rows == 0 and place.contents() == before
    assert place.score()["responses_of_suites_alone"] == 0


@pytest.mark.slow
def test_what_is_published_is_reused_without_a_journal(place, monkeypatch):
    """A fresh clone after `dvc pull`."""
    suites = Suites(place.root, one=NEW)
    place.score(**suites.options)
    before = [path.read_bytes() for folder in (place.out, suites.out) for path in sorted(folder.iterdir())]
    place.home = place.root / "another-home"
    monkeypatch.setattr(supervision, "EngineProcess", None)
    assert place.score(**suites.options)["rows_scored"] == 0
    assert [path.read_bytes() for folder in (place.out, suites.out) for path in sorted(folder.iterdir())] == before


@pytest.mark.slow
def test_rows_that_cant_be_scored_are_named_by_suite_and_line(place, capsys):
    prompt = np.arange(3, 13, dtype=np.int32)
    too_long = np.full(POSITIONS, 7, np.int32)
    suites = Suites(place.root, fine=NEW, longish=[*NEW[:2], (prompt, too_long), (prompt, too_long[:50])])
    with pytest.raises(RequestError, match=r"\(suite longish rows:\d+\) has 310 tokens") as error:
        place.score(**suites.options)
    assert f"1 of {len(keys([*OWN, *NEW])) + 2} responses" in str(error.value)
    assert f"{place.out} and {suites.out} are as they were" in str(error.value)
    assert "(suite longish rows:" in capsys.readouterr().err
    assert place.journalled() == keys([*OWN, *NEW, (prompt, too_long[:50])])  # all others
    assert not place.out.exists() and not suites.out.exists()


def test_both_options_or_none(place):
    words = ("score", "--out", place.out, "--metrics", place.metrics, "--suites", place.root)
    result = place.command(*words)
    assert result.exit_code == 2 and "go together" in result.output


def test_suites_that_were_not_prepared_are_told_before_an_engine_starts(place, monkeypatch):
    monkeypatch.setattr(supervision, "EngineProcess", None)
    with pytest.raises(RequestError, match="run `dvc repro suites`"):
        place.score(suites=place.root / "absent", suites_out=place.root / "out")
