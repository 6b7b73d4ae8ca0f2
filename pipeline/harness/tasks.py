"""The tasks of evaluate.tasks: found and built once, then run for every model."""

import importlib
import logging
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pipeline.errors import RequestError
from pipeline.harness.data import is_local, local_data
from pipeline.harness.needs import INSTALL, check_ifeval, check_installed, is_ifeval
from pipeline.harness.results import TaskResults, task_results
from pipeline.hub import meet_hub
from pipeline.model.limits import model_limits
from pipeline.model.tokenizer import open_tokenizer
from pipeline.params import EvaluateParams
from pipeline.policies.answers import Answers, Ask
from pipeline.progress import activity
from pipeline.workspace import scratch_folder

if TYPE_CHECKING:
    from pipeline.harness.lm import Lengths, PolicyLM

_SEED, _OTHER_SEED = 0, 1234  # the harness's own, of random, and of numpy and the choice of examples
_NO_LENGTH = 2048  # tokens, where neither model nor evaluate.max_length says; as the harness's `hf`


class _Built(NamedTuple):
    tasks: dict[str, Any]
    groups: dict[str, Any]
    lm: "PolicyLM"
    lengths: "Lengths"  # of all that is asked


class Tasks:
    """What evaluate.tasks names. model: folder whose tokenizer, template and positions are all models'."""

    def __init__(
        self,
        params: EvaluateParams,
        model: Path,
        *,
        stop_token_ids: Sequence[int] = (),
        trust_remote_code: bool = False,
    ) -> None:
        """stop_token_ids: that end an answer, beside the stop strings of its task.

        The harness's `hf` knows those of the model alone, and goes on past any other end of turn.
        """
        self._params, self._model = params, model
        self._stop_token_ids, self._trust_remote_code = stop_token_ids, trust_remote_code

    def __bool__(self) -> bool:
        return bool(self._params.tasks)

    def check(self) -> None:
        """Find and build all tasks and their prompts. Raises RequestError for whatever would fail later."""
        if self:
            assert self._built

    @property
    def longest(self) -> int:
        """Tokens of the longest context with its answer; 0 without tasks."""
        return self._built.lengths.longest if self else 0

    @property
    def needs_tokenizer(self) -> bool:
        """Whether an engine must know the texts of tokens, for stop strings."""
        return bool(self) and self._built.lengths.draws

    def run(self, answers: Answers, ask: Ask) -> TaskResults:
        """Of one model; ask: called where something was not asked before."""
        from lm_eval.evaluator import evaluate

        from pipeline.harness.lm import Model

        built = self._built
        for task in built.tasks.values():
            for instance in task.instances:
                instance.resps, instance.filtered_resps = [], {}
        with _quiet(), _seeded():
            found = evaluate(
                lm=built.lm.asking(Model(answers, ask)),
                task_dict={"tasks": built.tasks, "groups": built.groups},
                limit=self._params.limit,
                bootstrap_iters=1,  # any number above 0 keeps the errors that have a formula; see _quiet
            )
        return task_results(found)

    # once for all models ----------------------------------------------------------------------------------------------

    @cached_property
    def _built(self) -> _Built:
        check_installed()
        with activity("reading evaluate.tasks"), _quiet(), _seeded():
            return self._build()

    def _build(self) -> _Built:
        from pipeline.harness.lm import Lengths, PolicyLM

        tokenizer = open_tokenizer(self._model, trust_remote_code=self._trust_remote_code)
        limits = model_limits(self._model, trust_remote_code=self._trust_remote_code)
        bounds = [bound for bound in (self._params.max_length, limits.positions) if bound is not None]
        lengths = Lengths()
        lm = PolicyLM(
            tokenizer,
            lengths,
            max_length=min(bounds, default=_NO_LENGTH),
            positions=limits.positions,
            stop_token_ids=self._stop_token_ids,
            seed=self._params.seed,
        )
        tasks, groups = self._load()
        template = self._params.apply_chat_template and tokenizer.chat_template is not None
        if self._params.apply_chat_template and not template:
            print(f"{self._model} has no chat template, so tasks are asked without one.", file=sys.stderr)
        for name, task in tasks.items():
            try:
                task.build_all_requests(
                    limit=self._params.limit,
                    apply_chat_template=template,
                    fewshot_as_multiturn=template,
                    chat_template=lm.apply_chat_template if template else None,
                    tokenizer_name=lm.tokenizer_name if template else "",
                )
            except Exception as error:  # of the task's own code and data
                raise RequestError(f"The prompts of {name} in evaluate.tasks can't be written: {error}") from error
            # They are the same for every model, and the examples before a question are drawn anew in each call.
            task.build_all_requests = lambda **_: None
            for kind in {instance.request_type for instance in task.instances}:
                getattr(lm, kind)([instance for instance in task.instances if instance.request_type == kind])
        if lengths.largest_id >= limits.vocabulary:
            raise RequestError(
                f"The tasks' prompts have token id {lengths.largest_id}, but {self._model} has {limits.vocabulary} "
                "embeddings. Its tokenizer is another model's; run `dvc repro`."
            )
        return _Built(tasks, groups, lm, lengths)

    def _load(self) -> tuple[dict[str, Any], dict[str, Any]]:
        from pipeline.harness.names import PRESETS, find_tasks

        tasks: dict[str, Any] = {}
        groups: dict[str, Any] = {}
        with tempfile.TemporaryDirectory(dir=scratch_folder()) as folder:
            named = find_tasks(self._params.tasks, Path(folder))
            remote = False
            for name, above in named.leaves().items():
                config = named.index[name].cfg or {}
                if is_ifeval(config):
                    check_ifeval(name)
                changes = {}
                if self._params.task_data is not None:
                    known_as = [name, *([PRESETS[name][0]] if name in PRESETS else []), *above]
                    changes = local_data(Path(self._params.task_data), known_as, config, self._shots(name, config))
                if changes:
                    named.put(name, name, changes, Path(folder))
                remote = remote or not (changes or is_local(config))
            if remote:
                meet_hub()
            for name in named.names:
                loaded = _loaded(named.manager, name)
                tasks |= loaded["tasks"]
                groups |= loaded.get("groups") or {}
        for name, task in tasks.items():
            _check_supported(name, task)
            shots = self._shots(name, {"num_fewshot": task.get_config("num_fewshot")})
            task.set_config(key="num_fewshot", value=shots)
            task.set_fewshot_seed(seed=_OTHER_SEED)
        return tasks, groups

    def _shots(self, name: str, config: dict[str, Any]) -> int:
        """As the harness: a task that says 0 keeps it."""
        from pipeline.harness.names import PRESETS

        own: int | None = config.get("num_fewshot")
        if self._params.fewshot is None or own == 0 or name in PRESETS:
            return own or 0
        return self._params.fewshot


def _loaded(manager: Any, name: str) -> Any:
    try:
        return manager.load([name])
    except ImportError as error:
        raise RequestError(
            f"{name} in evaluate.tasks needs a package that is not installed ({error}). Install it, or {INSTALL}."
        ) from error
    except Exception as error:  # of the datasets library, and of the task's own code
        text = " ".join(str(error).split())
        library = type(error).__module__.partition(".")[0]
        if isinstance(error, OSError) or library in ("datasets", "huggingface_hub") or "find cache" in text:
            raise RequestError(
                f"The data of {name} in evaluate.tasks can't be had: {text} Run once with a network, which leaves a "
                f"copy in the Hugging Face cache, or put the items into the folder evaluate.task_data as {name}.jsonl "
                f"or {name}/SPLIT.jsonl with the columns of the dataset."
            ) from error
        raise RequestError(f"{name} in evaluate.tasks can't be loaded: {type(error).__name__}: {text}") from error


def _check_supported(name: str, task: Any) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        raise RequestError(
            f"{name} in evaluate.tasks runs code that the model writes, which is not done here. Leave it out."
        )
    if getattr(task, "MULTIMODAL", False):
        raise RequestError(
            f"{name} in evaluate.tasks asks about images or sounds; models here read text. Leave it out."
        )


@contextmanager
def _seeded() -> Iterator[None]:
    """The harness's own seeds, so that tasks that draw something draw the same each time; ours are put back."""
    own, theirs = random.getstate(), np.random.get_state()
    random.seed(_SEED)
    np.random.seed(_OTHER_SEED)
    try:
        yield
    finally:
        random.setstate(own)
        np.random.set_state(theirs)


@contextmanager
def _quiet() -> Iterator[None]:
    """Warnings alone, no bars beside ours, no bootstrap (minutes, in processes of its own), one verdict always."""
    import datasets
    import lm_eval.api.metrics
    import lm_eval.api.task

    logger = logging.getLogger("lm_eval")
    level, bar, bootstrap = logger.level, lm_eval.api.task.tqdm, lm_eval.api.metrics.bootstrap_stderr
    bars = datasets.is_progress_bar_enabled()
    logger.setLevel(logging.WARNING)
    lm_eval.api.task.tqdm = lambda rows, **_: rows
    lm_eval.api.metrics.bootstrap_stderr = lambda *_, **__: "N/A"
    datasets.disable_progress_bars()
    if "langdetect" in sys.modules:
        importlib.import_module("langdetect").DetectorFactory.seed = 0  # else IFEval's verdicts differ between runs
    try:
        yield
    finally:
        logger.setLevel(level)
        lm_eval.api.task.tqdm, lm_eval.api.metrics.bootstrap_stderr = bar, bootstrap
        if bars:
            datasets.enable_progress_bars()
