"""Scoring on a Ray cluster: the same bytes as by one engine, whatever dies; and nothing is left running.

Stages, actors, engine processes and kills are real; in the engines a stand-in for vLLM answers (tests/stand_in), but
for one run.
"""

import json
import os
import random
import signal
import threading
from collections import Counter

import numpy as np
import pytest

from cache import Journal, open_reference, response_key
from pipeline.cluster import session
from pipeline.cluster.same_software import software
from pipeline.engine.pool import Pool
from pipeline.errors import RequestError, RunFailed
from pipeline.params import RayParams, SketchParams
from pipeline.reference import scoring
from pipeline.reference.identity import engine_version
from pipeline.reference.sketching import sketch_responses
from tests import stand_in
from tests.integration import kills
from tests.ray_cluster import another_job, gone, processes_under, ray_cluster
from tests.scoring_project import PARAMS, ScoringProject
from tests.tiny import plain_logps, write_model, write_pairs

pytestmark = pytest.mark.slow

ROWS, POISON, SLOW = 120, 63, 62
SMALL = RayParams(cpus=0.5)


@pytest.fixture(scope="module")
def cluster():
    with ray_cluster(2) as cluster:
        yield cluster


def uneven_rows(last=62):
    """Prompts of 1 to 200 tokens, with 1 to 7 responses of 1 to 80; and one that a test can make slow."""
    draw, rows = np.random.default_rng(0), []
    while len(rows) < ROWS:
        prompt = draw.integers(3, last, draw.integers(1, 201)).astype(np.int32)
        rows += [
            (prompt, draw.integers(3, last, draw.integers(1, 81)).astype(np.int32)) for _ in range(draw.integers(1, 8))
        ]
    return [*rows[: ROWS - 1], (np.array([9], np.int32), np.array([SLOW], np.int32))]


def on_ray(engines, **changes):
    return PARAMS.model_copy(update={"workers": "ray", "engines": engines, "ray": SMALL, "rows_per_call": 4} | changes)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, model):
    """The shards of one engine on this machine."""
    place = ScoringProject(tmp_path_factory.mktemp("undisturbed"), model, uneven_rows())
    with pytest.MonkeyPatch.context() as patch:
        for name, value in stand_in.environment({}).items():
            patch.setenv(name, value)
        place.score(params=PARAMS.model_copy(update={"rows_per_call": 4}))
    return kills.shards(place.out)


@pytest.fixture
def place(tmp_path, model, cluster, monkeypatch):
    place = ScoringProject(tmp_path, model, uneven_rows())
    place.asked = tmp_path / "asked"
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("REFCACHE_STAND_IN", json.dumps({"asked": str(place.asked)}))
    return place


def after_append(monkeypatch, do):
    """Call do(n) when the journal has taken its n-th call."""
    append, count = Journal.append, iter(range(1, 10**6))

    def append_and_do(journal, rows):
        append(journal, rows)
        do(next(count))

    monkeypatch.setattr(Journal, "append", append_and_do)


def slow_call(place, monkeypatch, **wish):
    """From now on the call with the slow row ends when somebody writes to the FIFO that is returned."""
    fifo = place.root / "fifo"
    os.mkfifo(fifo)
    wish |= {"asked": str(place.asked), "wait": [SLOW, str(fifo)]}
    monkeypatch.setenv("REFCACHE_STAND_IN", json.dumps(wish))
    return fifo


def test_kills_of_the_stage_and_ten_of_actors_and_engines_cost_their_calls_alone_and_end_in_the_same_bytes(
    place, cluster, undisturbed, score_nursery, monkeypatch
):
    params = {"workers": "ray", "engines": 2, "ray": SMALL, "rows_per_call": 4}
    wish = {"asked": str(place.asked)}
    for moment, status in (("stage_after_append", -signal.SIGKILL), ("stage_terminated_after_append", 143)):
        found, output = score_nursery.score(place, [(moment, 2)], wish=wish, **params)
        assert found == status, output
        assert gone(cluster.actors), output
    before, already = kills.journalled(place.home), len(kills.asked(place.asked))
    assert 4 <= len(before) < ROWS / 4

    draw = random.Random(5)
    moments, killed = set(draw.sample(range(1, 26), 11)), Counter()

    def kill_one(n):
        if n in moments:
            kind = draw.choice(["actors", "engines"])
            if living := getattr(cluster, kind)():
                os.kill(draw.choice(living), signal.SIGKILL)
                killed[kind] += 1

    after_append(monkeypatch, kill_one)
    found = place.score(params=on_ray(3))
    assert killed.total() >= 10 and min(killed.values()) >= 2
    assert found["engine_restarts"] <= killed.total()  # one that is killed where nothing is left to ask is not replaced
    asked = kills.asked(place.asked)[already:]
    assert len(asked) <= ROWS - len(before) + 4 * killed.total()
    assert not before.keys() & set(asked)
    assert kills.journalled(place.home) == {response_key(*row): 1 for row in place.rows}
    assert kills.shards(place.out) == undisturbed
    assert gone(cluster.actors)


def test_a_slow_call_holds_nobody_up_and_a_row_that_ends_three_engines_is_set_aside(
    place, cluster, monkeypatch, capsys
):
    fifo = slow_call(place, monkeypatch, poison=POISON)
    bad = [place.rows[-1], (np.array([8], np.int32), np.array([5, POISON], np.int32))]
    poisoned = ScoringProject(place.root / "poisoned", place.model, [*place.rows[:40], *bad])
    others = {response_key(*row) for row in place.rows[:40]}

    def let_the_slow_one_go(n):
        if kills.journalled(poisoned.home).keys() == others:
            fifo.write_text("")

    after_append(monkeypatch, let_the_slow_one_go)
    with pytest.raises(RunFailed, match=response_key(*bad[1]).hex()):
        poisoned.score(params=on_ray(2, rows_per_call=1))
    assert Counter(kills.asked(place.asked))[response_key(*bad[1])] == 3
    assert kills.journalled(poisoned.home) == dict.fromkeys(others | {response_key(*bad[0])}, 1)
    assert "was killed by signal 9" in capsys.readouterr().err


def test_a_node_that_dies_costs_its_calls_and_the_others_go_on(place, cluster, undisturbed, monkeypatch, capsys):
    monkeypatch.setattr(session, "MOVE_SECONDS", 1.0)
    fifo, node, retire = slow_call(place, monkeypatch), cluster.add_node(2), Pool._retire

    def retire_and_let_the_slow_one_go(pool, *arguments):
        retired = retire(pool, *arguments)
        threading.Thread(target=fifo.write_text, args=("",), daemon=True).start()  # waits for the call
        return retired

    monkeypatch.setattr(Pool, "_retire", retire_and_let_the_slow_one_go)  # or all is answered before it comes to that
    after_append(monkeypatch, lambda n: n == 4 and cluster.end_node(node))
    found = place.score(params=on_ray(2, ray=RayParams(cpus=1.5)))  # one fits on each node
    assert found["engines"] == 2
    assert "is given up, and the run goes on with 1. " in capsys.readouterr().err
    assert kills.shards(place.out) == undisturbed


def test_a_node_with_other_weights_or_software_is_refused_by_name_before_its_first_row(place, cluster, monkeypatch):
    other, link = write_model(place.root / "other", seed=1), place.root / "link"
    link.symlink_to(place.model)
    place.model = link
    identify = scoring.reference_identity

    def identify_and_exchange(*arguments, **options):
        identity = identify(*arguments, **options)
        link.unlink()
        link.symlink_to(other)
        return identity

    monkeypatch.setattr(scoring, "reference_identity", identify_and_exchange)
    with pytest.raises(RequestError, match=rf"Node {os.uname().nodename} has another .*: its weights hash to"):
        place.score(params=on_ray(2))
    monkeypatch.setattr(session, "software", lambda: software() | {"vllm": "0.1"})
    with pytest.raises(RequestError, match=rf"Node .* has other software: vllm {engine_version()} there, 0.1 here"):
        place.score(params=on_ray(2))
    assert gone(cluster.actors) and not place.asked.exists()


def test_what_the_cluster_has_not_is_said_before_anything_waits_for_it(place, cluster, monkeypatch):
    with pytest.raises(RequestError) as refused:
        place.score(params=on_ray(3, ray=RayParams(cpus=1, gpus=1)))
    assert "Found 2 CPUs on 1 nodes, which is room for 0" in str(refused.value)
    with pytest.raises(RequestError, match=r"set score.engines to 2, or"):
        place.score(params=on_ray(3, ray=RayParams(cpus=0.8)))
    monkeypatch.setattr(session, "RESERVE_SECONDS", 1.0)
    with another_job(cluster, cpus=1.5), pytest.raises(RequestError, match="only 1 got theirs within 1 s"):
        place.score(params=on_ray(2))


def test_a_cluster_of_its_own_ends_with_its_stage_however_that_ends_and_two_real_engines_go_on(
    tmp_path, model, score_nursery
):
    """Rows of the stand-in first, then of vLLM: both are right to a thousandth of a nat."""
    place = ScoringProject(tmp_path, model, uneven_rows()[:60])
    params = {"workers": "ray", "rows_per_call": 4}
    found, output = score_nursery.score(place, [("stage_after_append", 3)], wish={}, engines=1, ray=SMALL, **params)
    assert found == -signal.SIGKILL, output
    assert gone(lambda: processes_under(place.home)), output
    before = kills.journalled(place.home).keys()
    assert 3 <= len(before) < 40
    found, output = score_nursery.score(place, engines=2, ray=RayParams(cpus=1), **params)
    assert found == 0, output
    assert gone(lambda: processes_under(place.home), 1.0), output
    metrics = json.loads(place.metrics.read_text())
    assert (metrics["engines"], metrics["rows_scored"]) == (2, 60 - len(before))
    rows = {row["response_key"]: row for row in open_reference(place.out, expect=None).scan().collect().to_dicts()}
    for prompt, response in place.rows:
        expected = plain_logps(model, prompt.tolist(), response.tolist())
        assert rows[response_key(prompt, response)]["token_logps"] == pytest.approx(expected, abs=1e-3)


def test_sketches_are_the_same_bytes_by_a_rank_on_ray_that_is_killed_and_replaced(
    tmp_path, model, cluster, monkeypatch
):
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    pairs, made = write_pairs(tmp_path / "pairs", 16), []
    params = SketchParams(mode="tensorsketch", k=32, audit=8, batch_tokens=64)
    for changes in ({}, {"workers": "ray", "ranks": 1, "ray": SMALL}):
        folder = tmp_path / f"run{len(made)}"
        monkeypatch.setenv("REFCACHE_HOME", str(folder / "home"))
        if changes:
            after_append(monkeypatch, lambda n: n == 3 and os.kill(cluster.actors()[0], signal.SIGKILL))
        sketch_responses(
            pairs=pairs,
            model=model,
            out=folder / "sketches",
            metrics=folder / "metrics.json",
            params=params.model_copy(update=changes),
            trainable="last_block",
        )
        made.append(kills.published(folder / "sketches"))
    assert made[0] == made[1]
    assert gone(cluster.actors)
