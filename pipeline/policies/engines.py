"""One engine that answers for one policy after another: weights exchanged, adapters named in the request.

Starting vLLM costs far more than the questions that evaluation asks of a small model. So policies of one shape share an
engine, which is built with noise and given each policy's weights in turn; adapters share one that holds the reference.
vLLM does neither rightly for every model, version and kind of adapter: the first of each is compared with transformers'
forward, and where they differ, or where vLLM refuses, every policy gets an engine of its own.
"""

import json
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, Self

from pipeline.engine.probe import Probe, make_probe, probe_of
from pipeline.engine.process import EngineProcess
from pipeline.engine.rows import EngineLength
from pipeline.errors import EngineFailed
from pipeline.model.limits import model_limits
from pipeline.model.opening import ADAPTER_CONFIG, open_model
from pipeline.params import ScoreParams
from pipeline.policies.identity import Policy, Shape, folder_shape
from pipeline.progress import activity
from pipeline.workspace import log_file

# vLLM's own answers in one batch differ by less, and so did exchanged weights and adapters where they were right.
EXCHANGED_TOLERANCE = 1e-4  # nats a token, float32
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM 0.32 reserves memory for


class Needs(NamedTuple):
    """What engines are built for. length: of all policies' sequences. tokenizer: see EngineProcess.load."""

    length: EngineLength
    tokenizer: Path | None = None


class PolicyEngines:
    """A context manager; `use` gives the engine that answers for a policy, until the next `use` of another.

    starts, exchanges, adapted: engines built, weights brought into a running one, adapters that came with requests.
    """

    def __init__(
        self, policies: Sequence[Policy], base: Path, params: ScoreParams, *, log: str, trust_remote_code: bool = False
    ) -> None:
        """Nothing is started before the first `use`. policies: all that it may be called with, the reference too.

        base: the reference's folder, which adapters are laid over. log: name of the engines' log file.
        """
        self.starts = self.exchanges = self.adapted = 0
        self._policies, self._base, self._params = list(policies), base, params
        self._log, self._trust_remote_code = log, trust_remote_code
        self._needs: Needs | None = None
        # Quantised weights are packed when an engine is built.
        self._works = {_EXCHANGE: params.quantization is None, _ADAPTERS: params.quantization is None}
        self._proved: set[object] = set()
        self._refused: set[str] = set()  # kinds of adapters
        self._current: Policy | None = None
        self._holds: object = None  # what the loaded engine can answer for: a shape, _ADAPTERS, or what is current
        self._merge = ExitStack()
        self._process: EngineProcess | None = None

    def prepare(self, needs: Needs) -> None:
        """To be called before the first `use`."""
        self._needs = needs

    def use(self, policy: Policy) -> EngineProcess:
        """An engine that answers for this policy and no other. Raises EngineFailed, RequestError as merging does."""
        if self._process is not None and self._process.ended:
            self._process = self._current = self._holds = None
        if self._process is not None and self._current == policy:
            return self._process
        self._current = None
        try:
            engine = self._bare(policy) or self._adapted(policy) or self._weights(policy)
        except BaseException:
            self.discard()  # what it holds is unknown
            raise
        self._current = policy
        return engine

    def discard(self) -> None:
        """End the engine; the next `use` starts another."""
        if self._process is not None:
            self._process.kill()
        self._process = self._current = self._holds = None

    # weights ----------------------------------------------------------------------------------------------------------

    def _weights(self, policy: Policy) -> EngineProcess:
        from pipeline.trainable.merging import loadable  # torch, which a run that asks nothing does without

        self._merge.close()  # of the policy before
        folder = self._merge.enter_context(
            loadable(policy.folder, self._base, trust_remote_code=self._trust_remote_code)
        )
        shape = folder_shape(folder)
        whole = [other for other in self._policies if not other.is_adapter]
        shared = len(whole) < len(self._policies) or sum(other.shape == shape for other in whole) > 1
        if self._works[_EXCHANGE] and shared:
            if engine := self._exchanged(folder, shape):
                return engine
            self._works[_EXCHANGE] = False
        self._load(folder)
        return self._engine()

    def _exchanged(self, folder: Path, shape: Shape) -> EngineProcess | None:
        """The engine with the folder's weights in it; None where vLLM can't or does it wrongly."""
        try:
            if self._holds != shape:
                self._load(folder, exchangeable=True)
                self._holds = shape
            engine = self._engine()
            engine.exchange(folder)
        except EngineFailed as error:
            _say(f"{str(error).splitlines()[0]} Each policy gets an engine of its own now, which takes longer.")
            return None
        self.exchanges += 1
        return engine if self._proves(engine, shape, lambda: self._probe(folder), f"weights of {folder}") else None

    def _probe(self, folder: Path) -> Probe:
        return make_probe(folder, **self._probe_options(folder), trust_remote_code=self._trust_remote_code)

    # adapters ---------------------------------------------------------------------------------------------------------

    def _bare(self, policy: Policy) -> EngineProcess | None:
        """The engine of the adapters without any, where the policy is what they are laid over."""
        if self._holds is not _ADAPTERS or policy.folder != self._base:
            return None
        self._engine().adapt(None)
        return self._engine()

    def _adapted(self, policy: Policy) -> EngineProcess | None:
        """The engine with the policy's adapter; None for whole weights, and where vLLM can't or does it wrongly."""
        if not policy.is_adapter or not self._works[_ADAPTERS]:
            return None
        rank, kind = lora_rank(self._policies), _adapter_kind(policy.folder)
        if rank is None or kind in self._refused:
            return None
        try:
            if self._holds is not _ADAPTERS:
                self._load(self._base, lora_rank=rank)
                self._holds = _ADAPTERS
            engine = self._engine()
            refused = engine.adapt(policy.folder)
        except EngineFailed as error:  # of an architecture without adapters, for example
            _say(f"{str(error).splitlines()[0]} Adapters are merged instead.")
            self._works[_ADAPTERS] = False
            return None
        if refused is not None:
            _say(f"vLLM does not take the adapter {policy.folder} ({refused}); it is merged instead.")
            self._refused.add(kind)
            return None
        if not self._proves(engine, kind, lambda: self._adapted_probe(policy.folder), f"adapter {policy.folder}"):
            self._works[_ADAPTERS] = False
            return None
        self.adapted += 1
        return engine

    def _adapted_probe(self, adapter: Path) -> Probe:
        import torch

        from pipeline.trainable.adapters import open_adapter

        dtype = getattr(torch, self._params.dtype)
        base = open_model(self._base, dtype=dtype, trust_remote_code=self._trust_remote_code)
        adapted = open_adapter(base, adapter, failed=f"{adapter} can't be laid over {self._base}")
        return probe_of(adapted, **self._probe_options(self._base))

    # both -------------------------------------------------------------------------------------------------------------

    def _probe_options(self, folder: Path) -> dict[str, Any]:
        assert self._needs is not None
        return {
            "vocabulary": model_limits(folder, trust_remote_code=self._trust_remote_code).vocabulary,
            "longest": self._needs.length.max_model_len - 1,
            "dtype": self._params.dtype,
            "quantization": self._params.quantization,
        }

    def _proves(self, engine: EngineProcess, kind: object, probe: Callable[[], Probe], what: str) -> bool:
        """Whether the engine's answers are transformers', for the first of a kind; says so where they are not."""
        if kind in self._proved:
            return True
        with activity(f"comparing vLLM with transformers on the {what}"):
            expected = probe()
            difference = expected.largest_difference(engine.score(expected.rows, lambda *_: None).logps)
        exact = self._params.dtype == "float32" and self._params.quantization is None
        tolerance = EXCHANGED_TOLERANCE if exact else expected.tolerance
        if difference <= tolerance:
            self._proved.add(kind)
            return True
        _say(
            f"With the {what}, a running vLLM gave log-probs up to {difference:.3g} nats from transformers' (allowed "
            f"{tolerance:g}). Each policy gets an engine of its own now, which takes longer."
        )
        return False

    def _load(self, folder: Path, *, exchangeable: bool = False, lora_rank: int | None = None) -> None:
        assert self._needs is not None
        self._end()
        self._process = EngineProcess(self._params, log=log_file(self._log))
        if exchangeable or lora_rank is not None:
            import transformers  # noqa: F401  # for the comparison to come, while vLLM imports what it needs
        self.starts += 1
        self._process.load(
            folder,
            self._needs.length,
            sampling=True,
            trust_remote_code=self._trust_remote_code,
            exchangeable=exchangeable,
            lora_rank=lora_rank,
            tokenizer=self._needs.tokenizer,
        )

    def _engine(self) -> EngineProcess:
        assert self._process is not None
        return self._process

    def _end(self) -> None:
        if self._process is not None:
            self._process.close()
        self._process = self._holds = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        if raised[0] is None:
            self._end()
        else:
            self.discard()
        self._merge.close()


_EXCHANGE, _ADAPTERS = "exchange", "adapters"


def in_order(policies: Sequence[Policy]) -> list[Policy]:
    """Those with whole weights first, then adapters, so that neither waits for the other's engine twice."""
    return sorted(policies, key=lambda policy: policy.is_adapter)


def lora_rank(policies: Sequence[Policy]) -> int | None:
    """The smallest rank of LORA_RANKS that holds every adapter's; None where one needs more, or states none."""
    ranks = [0]
    for policy in policies:
        if policy.is_adapter:
            config = _adapter_config(policy.folder)
            ranks += [config.get("r") or LORA_RANKS[-1] + 1, *(config.get("rank_pattern") or {}).values()]
    return next((rank for rank in LORA_RANKS if rank >= max(ranks)), None)


def _adapter_kind(folder: Path) -> str:
    """Equal for adapters that differ in their numbers alone."""
    config = _adapter_config(folder)
    targets = config.get("target_modules")
    kind = config | {"target_modules": sorted(targets) if isinstance(targets, list) else targets}
    return json.dumps(
        {name: value for name, value in kind.items() if name != "base_model_name_or_path"}, sort_keys=True
    )


def _adapter_config(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    return content


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
