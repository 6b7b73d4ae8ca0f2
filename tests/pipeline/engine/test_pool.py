"""Calls are dealt to whichever worker is free, once each, and a run goes on as long as one worker is left.

Workers are threads' own here, not processes: those are in tests/integration/test_engines.py.
"""

import threading
from pathlib import Path

import pytest

from pipeline.engine.pool import DEATHS_IN_ALL, DEATHS_WITHOUT_AN_ANSWER, STARTS, Pool
from pipeline.errors import EngineFailed, RunFailed


class Worker:
    """Answers with the call and its place, unless `deeds` has something else for that call."""

    log = Path("worker.log")

    def __init__(self, place, deeds):
        self.place, self.deeds, self.killed = place, deeds, threading.Event()

    def ask(self, call):
        if self.killed.is_set():
            raise EngineFailed("It is gone.")
        if call in self.deeds:
            self.deeds[call](self)
        return call, self.place

    def die(self, *_):
        self.killed.set()
        raise EngineFailed("It died.\nIts log ends with nothing.")

    def wait_for(self, event):
        while not event.wait(0.01):
            if self.killed.is_set():
                raise EngineFailed("It was killed.")

    def close(self):
        self.killed.set()

    kill = close


def pool(count, deeds=None, start=None):
    return Pool(count, start or (lambda place: Worker(place, deeds or {})), hopeless=RunFailed)


def answers(of, calls, again=lambda lost: [lost.call]):
    return of.answers(calls, lambda worker, call: worker.ask(call), again)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_every_call_is_answered_once(count):
    with pool(count) as workers:
        found = [call for call, _ in answers(workers, range(100))]
        assert sorted(found) == list(range(100))
        assert sorted(call for call, _ in answers(workers, range(3))) == [0, 1, 2]
    assert workers.restarts == 0


def test_calls_are_drawn_as_they_are_taken():
    """A million calls are never held at once: beyond what was taken, two a worker."""
    drawn = []
    with pool(3) as workers:
        for number, _ in enumerate(answers(workers, (drawn.append(call) or call for call in range(1000)))):
            assert len(drawn) <= number + 1 + 2 * 3


def test_one_slow_call_holds_up_nobody_else():
    release = threading.Event()
    with pool(2, {0: lambda worker: worker.wait_for(release)}) as workers:
        found = []
        for call, _ in answers(workers, range(50)):
            found.append(call)
            if len(found) == 49:
                assert 0 not in found
                release.set()
    assert sorted(found) == list(range(50))


def test_a_dead_workers_call_is_asked_again_after_what_is_planned_and_nothing_else_is():
    dead, asked, lost = [], [], []

    def die_once(worker):
        if not dead:
            dead.append(worker.place)
            worker.die()

    def ask(worker, call):
        asked.append(call)
        return worker.ask(call)

    with pool(1, {3: die_once}) as workers:
        found = [c for c, _ in workers.answers(range(6), ask, lambda it: lost.append(it) or [it.call])]
    assert found == [0, 1, 2, 4, 5, 3] and asked == [0, 1, 2, 3, 4, 5, 3]
    assert [(it.call, it.deaths, it.how) for it in lost] == [(3, 1, "It died.")] and workers.restarts == 1


def test_deaths_of_a_call_are_counted_until_it_is_given_up():
    seen = []

    def again(lost):
        seen.append(lost.deaths)
        return [lost.call] if lost.deaths < 3 else []

    with pool(2, {7: Worker.die}) as workers:
        found = [call for call, _ in answers(workers, range(20), again)]
    assert sorted(found) == [n for n in range(20) if n != 7] and seen == [1, 2, 3]


def only_once(first):
    """A start that gives each place a worker with the deeds `first(place)`, and can't replace it."""
    started = []

    def start(place):
        started.append(place)
        if started.count(place) > 1:
            raise EngineFailed("There is no such device.")
        return Worker(place, first(place))

    return start, started


def test_a_place_whose_worker_cannot_be_replaced_is_given_up(capsys):
    died = threading.Event()
    waits = {call: lambda worker: worker.wait_for(died) for call in range(9)}
    start, started = only_once(lambda place: dict.fromkeys(range(9), Worker.die) if place == 0 else waits)
    with pool(2, start=start) as workers:
        found = sorted(call for call, _ in answers(workers, range(9), lambda lost: died.set() or [lost.call]))
    assert found == list(range(9)) and started.count(0) == 1 + STARTS
    assert "Engine 1 of 2 is given up, and the run goes on with 1" in capsys.readouterr().err


def test_the_last_place_that_is_lost_ends_the_run():
    start, started = only_once(lambda place: dict.fromkeys(range(9), Worker.die))
    cause = f"{STARTS} others could not take its place.*no such device"
    with pytest.raises(EngineFailed, match=cause), pool(2, start=start) as workers:
        list(answers(workers, range(9)))
    assert len(started) == 2 * (1 + STARTS)


@pytest.mark.parametrize("count", [1, 3])
def test_workers_that_only_die_end_the_run(count):
    deaths = []
    with (
        pytest.raises(RunFailed, match="the last like this: It died"),
        pool(count, dict.fromkeys(range(99), Worker.die)) as p,
    ):
        list(answers(p, range(99), lambda lost: deaths.append(lost) or [lost.call]))
    assert len(deaths) <= min(count * DEATHS_IN_ALL, count * DEATHS_WITHOUT_AN_ANSWER)


def test_an_error_of_another_kind_is_the_callers_once_open_calls_are_answered():
    def refuse(worker):
        raise ValueError("not this one")

    found = []
    with pytest.raises(ValueError, match="not this one"), pool(2, {4: refuse}) as workers:
        for call, _ in answers(workers, range(9)):
            found.append(call)
    assert {0, 1, 2, 3} <= set(found)


def test_all_workers_are_killed_at_the_same_time():
    """Eight engines that take seconds each to give their memory back end in the time of one."""
    together, met = threading.Barrier(3), []

    class Slow(Worker):
        def kill(self):
            met.append(together.wait(timeout=5))

    with pytest.raises(KeyboardInterrupt), pool(3, start=lambda place: Slow(place, {})):
        raise KeyboardInterrupt
    assert sorted(met) == [0, 1, 2]


def test_leaving_ends_workers_that_are_being_asked():
    forever, started = threading.Event(), []

    def start(place):
        started.append(Worker(place, {1: lambda worker: worker.wait_for(forever)}))
        return started[-1]

    with pytest.raises(KeyboardInterrupt), pool(2, start=start) as workers:
        for _ in answers(workers, range(2)):
            raise KeyboardInterrupt
    assert all(worker.killed.is_set() for worker in started)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("place-")]
