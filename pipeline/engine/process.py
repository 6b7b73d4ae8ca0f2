"""A child process that owns the vLLM engine, so that its crash, hang or memory never becomes the stage's own.

The stage talks to it over a pipe (the child's side is server.py) and never waits longer than
params.timeout_seconds for a sign of life. Everything the engine prints, from C++ too, goes to a log file.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, Self

import numpy as np

from pipeline.engine.environment import engine_environment
from pipeline.engine.probe import Probe
from pipeline.engine.rows import EngineLength, Row, Sampling
from pipeline.errors import EngineFailed
from pipeline.params import ScoreParams
from pipeline.progress import Advance, activity
from pipeline.sketches.head_plan import HeadPlan, HeadSketch

_LOG_LINES_SHOWN = 15
_LOOK_SECONDS = 1.0  # between two looks at whether a silent engine is still alive


class Scored(NamedTuple):
    """logps: nats, float32 (response length,) a row. shared_tokens: prompt tokens not computed again, since another
    row had computed them. rescored: rows whose shared answer failed its check and which were computed alone. sketches:
    of the head's gradient, None for rows that it was not asked for."""

    logps: list[np.ndarray]
    shared_tokens: int = 0
    rescored: int = 0
    sketches: Sequence[HeadSketch | None] = ()


def start_server(pipe: int, log: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """server.py in a process of its own. pipe: descriptor of its side; log: gets all that it prints.

    Not multiprocessing's own Process: this way the environment is the child's from its first instruction, its output is
    in the log from the first byte, and killing it leaves no semaphores behind in our name.
    """
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "pipeline.engine.server", str(pipe), str(os.getpid())],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=[pipe],
            start_new_session=True,  # Ctrl-C is the stage's to handle, and the group can be killed as a whole
        )


class EngineProcess:
    """vLLM in a process of its own; a context manager. Load a model, then ask; after EngineFailed it is closed.

    One thread at a time may use it, and any other may kill it meanwhile.
    """

    def __init__(self, params: ScoreParams, *, log: Path, place: Mapping[str, str] | None = None) -> None:
        """Start the process, which imports vLLM (6 to 15 s) while the caller does something else. It ends with the
        thread that calls this or `load`.

        log: file that receives all that the engine prints. place: of environment.engine_places; None: all GPUs or
        cores.
        """
        self.log = log
        self._params, self._place = params, dict(place or {})
        self._starting, self._unwanted = threading.Lock(), False
        self._using = threading.RLock()  # the pipe, which must not be closed while another thread waits at it
        log.write_bytes(b"")
        self._start()

    def _start(self) -> None:
        with self._starting:
            if self._unwanted:
                raise EngineFailed("The vLLM engine was ended by its stage.")
            self._pipe, theirs = multiprocessing.Pipe()
            self._process = start_server(theirs.fileno(), self.log, engine_environment(self._params) | self._place)
            theirs.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def ended(self) -> bool:
        return self._pipe.closed

    def load(
        self,
        model: Path,
        length: EngineLength,
        *,
        probe: Probe | None = None,
        sampling: bool = False,
        trust_remote_code: bool = False,
        plan: HeadPlan | None = None,
        backend: str | None = None,
        exchangeable: bool = False,
        lora_rank: int | None = None,
        tokenizer: Path | None = None,
        classes: bool = False,
    ) -> str:
        """Build the engine, wait until it is ready, and return its backend (a key of backends.BACKENDS).

        length: from rows.engine_length. With a probe the fastest backend is taken that answers it rightly;
        without one, or with sampling (`generate`), the one that vLLM supports everywhere. plan: of sketches that
        `score` is going to be asked for, which hidden_states alone can give. backend: the only one to try; None: as
        params say. exchangeable: `model` says what is built, and `exchange` brings the weights. lora_rank: at most, of
        adapters for `adapt`. tokenizer: folder, for Sampling.stop. classes: a model for `classify`. Raises
        EngineFailed.
        """
        settings = {
            "model": model.absolute(),
            "params": self._params,
            "length": length,
            "sampling": sampling,
            "trust_remote_code": trust_remote_code,
            "plan": plan,
            "exchangeable": exchangeable,
            "lora_rank": lora_rank,
            "tokenizer": tokenizer,
        }
        with activity(f"starting vLLM ({self.log})"):
            on_cpu = self._ask(None, "did not start", None)
            candidates = _backends(self._params, on_cpu=on_cpu, choice=probe is not None and not sampling)
            if plan is not None or classes:
                candidates = ["classes" if classes else "hidden_states"]
            if backend is not None:
                candidates = [backend]
            for candidate in candidates:
                try:
                    self._ask(settings | {"backend": candidate}, "did not start", None)
                    if probe is not None and not sampling:
                        self._check(probe, candidate)
                    return candidate
                except EngineFailed as error:
                    if candidate == candidates[-1] or self._unwanted:
                        raise
                    print(f"vLLM's {candidate} is not used: {str(error).splitlines()[0]}", file=sys.stderr)
                    self._start()
                    self._ask(None, "did not start", None)
        raise AssertionError("there is always a last candidate")

    def _check(self, probe: Probe, backend: str) -> None:
        difference = probe.largest_difference(
            Scored(*self._ask(("score", (probe.rows,), {}), "failed its probe", None)).logps
        )
        if difference > probe.tolerance:
            self._end()
            raise self._failure(
                f"gave log-probs by {backend} that are up to {difference:.3g} nats from transformers' "
                f"(allowed {probe.tolerance:g}), so one of the two does not compute what the config says. Scoring "
                "would fill the reference cache with values that training does not share; docs/models.md lists the "
                "architectures that agree"
            )

    def score(self, rows: Sequence[Row], advance: Advance, *, sketched: Sequence[bool] | None = None) -> Scored:
        """Log-probs of each response's tokens; advance(rows, tokens) is called meanwhile.

        rows: validated (model/limits.py), those of one prompt next to each other. sketched: which of them get a
        sketch as well, of an engine that was loaded with a plan. Raises EngineFailed if the engine dies, fails or stays
        silent.
        """
        options = {} if sketched is None else {"sketched": sketched}
        return Scored(*self._ask(("score", (rows,), options), "failed while scoring", advance))

    def generate(
        self,
        prompts: Sequence[np.ndarray],
        advance: Advance,
        *,
        sampling: Sampling,
        seeds: Sequence[int],
    ) -> list[list[list[int]]]:
        """`sampling.n` answers a prompt as token ids, stop token included; raises as score. seeds: one a prompt."""
        options = {"sampling": sampling, "seeds": seeds}
        answers: list[list[list[int]]] = self._ask(("generate", (prompts,), options), "failed while sampling", advance)
        return answers

    def ranked(self, rows: Sequence[Row], advance: Advance) -> list[np.ndarray]:
        """As `score`, of an engine that samples: (response length, 2) a row, log-prob and rank of each token."""
        answers: list[np.ndarray] = self._ask(("ranked", (rows,), {}), "failed while scoring", advance)
        return answers

    def classify(self, sequences: Sequence[np.ndarray], advance: Advance) -> list[np.ndarray]:
        """Logits, float32 (classes,) a sequence of token ids, of an engine with `classes`; raises as score does."""
        answers: list[np.ndarray] = self._ask(("classify", (sequences,), {}), "failed while classifying", advance)
        return answers

    def exchange(self, model: Path) -> None:
        """Answer for the model in another folder, of the same config and tensors; needs `exchangeable`."""
        with activity(f"loading {model} into vLLM"):
            self._ask(("exchange", (model,), {}), f"failed while loading {model}", None)

    def adapt(self, adapter: Path | None) -> str | None:
        """Answer with a peft adapter, or with none; needs `lora_rank`. Returns why vLLM won't take it, or None."""
        refused: str | None = self._ask(("adapt", (adapter,), {}), f"failed while loading {adapter}", None)
        return refused

    def _ask(self, request: object, failed: str, advance: Advance | None) -> Any:
        """Send `request`, unless it is None, and wait for the answer."""
        with self._using:
            try:
                if request is not None:
                    with suppress(BrokenPipeError):  # a dead engine is reported by _answer, with its log
                        self._pipe.send(request)
                return self._answer(failed, advance)
            except BaseException:
                self._end()  # its state is unknown: vLLM may hang in the call after an error
                raise

    def _answer(self, failed: str, advance: Advance | None) -> Any:
        """The answer, after any number of progress reports; each of these starts the timeout anew."""
        while True:
            kind, value = self._next_message(failed)
            if kind == "answer":
                return value
            if kind == "error":
                raise self._failure(f"{failed}: {value}")
            if advance is not None:
                advance(*value)

    def _next_message(self, failed: str) -> tuple[str, Any]:
        deadline = time.monotonic() + self._params.timeout_seconds
        try:
            while not self._pipe.poll(_LOOK_SECONDS):
                # Not left to the end of the pipe: a worker that the engine forked may hold the other end open.
                if self._process.poll() is not None:
                    raise EOFError
                if time.monotonic() > deadline:
                    raise self._failure(
                        f"gave no sign of life for {self._params.timeout_seconds} s (score.timeout_seconds)"
                    )
            message: tuple[str, Any] = self._pipe.recv()
            return message
        except (EOFError, ConnectionResetError):
            code = self._process.wait()
            how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            raise self._failure(f"{failed}: its process {self.pid} {how}") from None

    def _failure(self, what: str) -> EngineFailed:
        tail = self.log.read_text(errors="replace").splitlines()[-_LOG_LINES_SHOWN:]
        return EngineFailed(
            f"The vLLM engine {what.rstrip('.')}.\n"
            f"Its log {self.log} ends with:\n" + "\n".join(f"  {line}" for line in tail) + "\n"
            "Rows finished before are kept: run the same command again to go on from there."
        )

    def close(self) -> None:
        """End the engine; returns when its memory is free."""
        with suppress(OSError):
            self._pipe.send(None)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=30)
        self.kill()

    def kill(self) -> None:
        """End the engine at once, from any thread; the one that waits for an answer gets EngineFailed."""
        with self._starting:
            self._unwanted = True
        self._end()

    def _end(self) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)  # with the workers of tensor parallelism, if they still live
        self._process.wait()
        if self._using.acquire(blocking=False):  # else its user notices the death, and comes here itself
            self._pipe.close()
            self._using.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        if raised[0] is None:
            self.close()
        else:
            self.kill()


def _backends(params: ScoreParams, *, on_cpu: bool, choice: bool) -> list[str]:
    """What to try, fastest first; the last is final."""
    if not choice:
        return ["prompt_logprobs"]
    if params.backend != "auto":
        return [params.backend]
    # Fixed-id scoring needs vLLM's second model runner, which doesn't run on CPU.
    return ["hidden_states", "prompt_logprobs"] if on_cpu else ["token_ids", "hidden_states", "prompt_logprobs"]


@contextmanager
def orderly_termination() -> Iterator[None]:
    """Turn SIGTERM into SystemExit(143) meanwhile, so that engines are ended and temporary folders removed."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    try:
        before = signal.signal(signal.SIGTERM, leave)
    except ValueError:  # not the main thread: whoever runs us there has handlers of their own
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
