"""Several workers that may die, each driven by a thread of its own; calls are dealt to whichever is free.

A call is asked whole and is the same whoever answers it, so numbers depend neither on how many workers there are nor on
which of them is fast. The caller's thread takes the answers, and alone writes them down.
"""

import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Generic, NamedTuple, Protocol, Self, TypeVar

from pipeline.errors import EngineFailed, RunFailed

# Beyond these it is hardly the calls: memory that runs out, a driver, a defect in the engine.
DEATHS_IN_ALL = 20  # for each worker that there is to be at a time
DEATHS_WITHOUT_AN_ANSWER = 8  # in a row at one place; a poisonous row needs three, and some may stand side by side
STARTS = 2  # attempts at one replacement
_END_SECONDS = 10.0  # for threads whose workers were killed


class Worker(Protocol):
    """What the pool asks of a worker besides answers. Whatever loads or asks it raises EngineFailed when it is gone."""

    @property
    def log(self) -> Path:
        """Where to read what it said."""

    def close(self) -> None:
        """End it in good order."""

    def kill(self) -> None:
        """End it at once, more than once too, and from another thread, whose call in it then raises EngineFailed."""


W = TypeVar("W", bound=Worker)
C = TypeVar("C")
A = TypeVar("A")


class Lost(NamedTuple, Generic[C]):
    """A call whose worker died. deaths: of all that had it, this one's included; how: of this one, a sentence."""

    call: C
    deaths: int
    how: str
    log: Path


@dataclass
class _Place(Generic[W]):
    """One of the workers that there are at a time, and the thread that drives it and those that replace it.

    The thread lasts as long as the pool: Linux ends a process that asked for it when the thread ends that started it.
    deaths: since its last answer.
    """

    number: int
    worker: W | None
    jobs: SimpleQueue[Callable[[], None] | None] = field(default_factory=SimpleQueue)
    deaths: int = 0
    answers: int = 0
    retired: bool = False

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._run, name=f"place-{self.number}", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        while (job := self.jobs.get()) is not None:
            job()


class Pool(Generic[W, C, A]):
    """`count` workers, replaced when they die; a context manager.

    A place whose worker can't be replaced, or whose workers die one after the other, is retired as long as others are
    left. restarts: workers started after the first of each place.
    """

    def __init__(
        self, count: int, start: Callable[[int], W], *, hopeless: Callable[[str], RunFailed], word: str = "engine"
    ) -> None:
        """start: makes the worker of a place, from 0; also called from other threads. word: what a worker is.

        hopeless: the error of a run whose workers go on dying, from what was found.
        """
        self.restarts = 0
        self._start, self._hopeless, self._word = start, hopeless, word
        self._load: Callable[[W], object] = lambda worker: None
        self._changed = threading.Condition()  # guards everything below
        self._ending = False
        self._failure: BaseException | None = None
        self._deaths = self._open = self._driving = 0  # open: calls that are being asked, or wait to be handed over
        self._planned: Iterator[C] = iter(())
        self._returned: deque[tuple[C, int]] = deque()  # drawn, but not asked
        self._suspects: deque[tuple[C, int]] = deque()  # (call, deaths of workers that had it)
        self._answers: deque[tuple[C, A]] = deque()
        with ExitStack() as undo:
            self._places: list[_Place[W]] = []
            undo.callback(self.kill)
            for number in range(count):
                self._places.append(_Place(number, start(number)))
            undo.pop_all()

    @property
    def answered(self) -> int:
        """Places that have answered a call."""
        return sum(place.answers > 0 for place in self._places)

    # loading ----------------------------------------------------------------------------------------------------------

    def load(self, load: Callable[[W], Any]) -> dict[int, Any]:
        """Call `load` with every worker, all at the same time; returns what it gave by place, failed ones left out.

        A failed one is tried again when there are calls for it. EngineFailed of the first where none could be loaded.
        `load` is called with every replacement, too.
        """
        self._load = load
        outcomes: SimpleQueue[tuple[_Place[W], Any, BaseException | None]] = SimpleQueue()
        for place in self._places:
            place.jobs.put(partial(self._load_first, place, outcomes))
        loaded, failed = dict[int, Any](), dict[int, EngineFailed]()
        for _ in self._places:
            place, outcome, error = outcomes.get()
            if isinstance(error, EngineFailed):
                failed[place.number], place.worker = error, None
            elif error is not None:
                raise error
            else:
                loaded[place.number] = outcome
        if not loaded:
            raise failed[min(failed)]
        for number, error in sorted(failed.items()):
            _say(f"{self._name(number)}: {_first_line(error)} It is tried again.")
        return dict(sorted(loaded.items()))

    def _load_first(self, place: _Place[W], outcomes: SimpleQueue[tuple[_Place[W], Any, BaseException | None]]) -> None:
        assert place.worker is not None
        try:
            outcomes.put((place, self._load(place.worker), None))
        except BaseException as error:
            outcomes.put((place, None, error))

    def drop(self, number: int, why: str) -> None:
        """End the worker of a place; another takes over when there are calls for it."""
        _say(f"{self._name(number)}: {why}")
        worker, self._places[number].worker = self._places[number].worker, None
        if worker is not None:
            worker.kill()

    # calls ------------------------------------------------------------------------------------------------------------

    def answers(
        self, planned: Iterable[C], ask: Callable[[W, C], A], again: Callable[[Lost[C]], Iterable[C]]
    ) -> Iterator[tuple[C, A]]:
        """Every call with its answer, as they come; at most two a worker wait to be taken.

        planned: drawn from when a worker is free, by one thread at a time. ask: called in the worker's thread. again:
        what to ask again of a call whose worker died, after all that is planned. What any of these raises, EngineFailed
        of `ask` aside, is raised here, once what was being asked is answered. RunFailed where workers go on dying,
        EngineFailed where the last one can't be replaced.
        """
        places = [place for place in self._places if not place.retired]
        with self._changed:
            self._planned, self._driving = iter(planned), len(places)
        for place in places:
            place.jobs.put(partial(self._drive, place, ask, again))
        while (answered := self._take()) is not None:
            yield answered

    def _take(self) -> tuple[C, A] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._answers or not self._driving)
            if self._answers:
                self._changed.notify_all()
                return self._answers.popleft()
            if self._failure is not None:
                raise self._failure
            return None

    def _drive(self, place: _Place[W], ask: Callable[[W, C], A], again: Callable[[Lost[C]], Iterable[C]]) -> None:
        """In the thread of a place: answer calls until there are none, or the place is retired."""
        try:
            while not place.retired and (drawn := self._next()) is not None:
                call, deaths = drawn
                if (worker := place.worker or self._replace(place)) is None:
                    self._close_call(returned=drawn)
                    continue
                try:
                    answer = ask(worker, call)
                except EngineFailed as error:
                    self._died(place, Lost(call, deaths + 1, _first_line(error), worker.log), again)
                else:
                    self._hand_over(place, call, answer)
        except BaseException as error:
            with self._changed:
                self._failure = self._failure or error
        with self._changed:
            self._driving -= 1
            self._changed.notify_all()

    def _next(self) -> tuple[C, int] | None:
        """A call to ask, with deaths in it before; None when all are answered, or the run is to end."""
        with self._changed:
            while not (self._ending or self._failure):
                if (drawn := self._draw()) is not None:
                    self._open += 1
                    return drawn
                if not self._open:
                    break
                self._changed.wait()  # a call that is being asked may have to be asked again
            self._changed.notify_all()
            return None

    def _draw(self) -> tuple[C, int] | None:
        if self._returned:
            return self._returned.popleft()
        for call in self._planned:
            return call, 0
        return self._suspects.popleft() if self._suspects else None

    def _hand_over(self, place: _Place[W], call: C, answer: A) -> None:
        with self._changed:
            self._changed.wait_for(lambda: len(self._answers) < len(self._places) or self._ending)
            place.deaths = 0
            place.answers += 1
            self._answers.append((call, answer))
        self._close_call()

    def _close_call(self, *, returned: tuple[C, int] | None = None) -> None:
        with self._changed:
            self._open -= 1
            if returned is not None:
                self._returned.append(returned)
            self._changed.notify_all()

    # deaths -----------------------------------------------------------------------------------------------------------

    def _died(self, place: _Place[W], lost: Lost[C], again: Callable[[Lost[C]], Iterable[C]]) -> None:
        with self._changed:
            place.worker = None
            if self._ending:
                return
            self._deaths += 1
            place.deaths += 1
            self._suspects.extend((piece, lost.deaths) for piece in again(lost))
            self._close_call()
            if self._deaths >= DEATHS_IN_ALL * len(self._places):
                raise self._hopeless(f"{self._deaths} {self._word}s died in this run, the last like this: {lost.how}")
            if place.deaths >= DEATHS_WITHOUT_AN_ANSWER:
                found = f"{place.deaths} {self._word}s in a row died without an answer"
                if not self._retire(place, f"{found}, the last like this: {lost.how}"):
                    raise self._hopeless(f"{found}, the last like this: {lost.how}")

    def _replace(self, place: _Place[W]) -> W | None:
        """A worker for a place that has none; None where there can't be one, and the place is retired."""
        failure: EngineFailed | None = None
        for _ in range(STARTS):
            with self._changed:
                self.restarts += 1
            try:
                return self._started(place)
            except EngineFailed as error:
                if self._ending:
                    raise
                failure = error
                _say(_first_line(error))
        assert failure is not None
        found = f"An {self._word} died, and {STARTS} others could not take its place."
        if self._retire(place, f"{found} {_first_line(failure)}"):
            return None
        raise EngineFailed(f"{found} {failure}")

    def _started(self, place: _Place[W]) -> W:
        worker = self._start(place.number)
        with self._changed:
            unwanted = self._ending
            if not unwanted:
                place.worker = worker  # from here on `kill` sees it
        if unwanted:
            worker.kill()
            raise EngineFailed(f"The {self._word} is not wanted any more.")
        try:
            self._load(worker)
        except BaseException:
            place.worker = None
            raise
        return worker

    def _retire(self, place: _Place[W], why: str) -> bool:
        """Do without a place, and say so; False where it is the last."""
        with self._changed:
            left = sum(not other.retired for other in self._places) - 1
            if not left:
                return False
            place.retired = True
            _say(f"{self._name(place.number)} is given up, and the run goes on with {left}. {why}")
            return True

    def _name(self, number: int) -> str:
        return f"{self._word.capitalize()} {number + 1} of {len(self._places)}"

    # the end ----------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """End all workers, at the same time and in good order; at once where calls are still being asked."""
        if self._driving:
            self.kill()
            return
        for place in self._places:
            if place.worker is not None:
                place.jobs.put(place.worker.close)
            place.jobs.put(None)
        for place in self._places:
            place.thread.join()

    def kill(self) -> None:
        """End all workers at once, whatever their threads are doing."""
        with self._changed:
            self._ending = True
            self._changed.notify_all()
            workers = [place.worker for place in self._places if place.worker is not None]
        # Side by side: an engine is gone when its GPU's memory is free, and that takes seconds for each.
        killers = [threading.Thread(target=worker.kill, daemon=True) for worker in workers]
        for killer in killers:
            killer.start()
        for place in self._places:
            place.jobs.put(None)
        for thread in [*killers, *(place.thread for place in self._places)]:
            thread.join(_END_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        if raised[0] is None:
            self.close()
        else:
            self.kill()


def _first_line(error: EngineFailed) -> str:
    return str(error).partition("\n")[0]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
