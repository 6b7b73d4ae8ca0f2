"""What one evaluation asks of every model, and what a cell's answers come to."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from pipeline.engine.process import EngineProcess
from pipeline.engine.rows import EngineLength, Sampling, engine_length, longest_prompt, longest_row, token_arrays
from pipeline.errors import RequestError
from pipeline.evaluation.answers_table import answers_table, true_rewards
from pipeline.evaluation.failing import Failing
from pipeline.evaluation.held_out import HeldOut
from pipeline.evaluation.metrics import PairValues, category_metrics, mean_over_prompts, pair_metrics, reference_metrics
from pipeline.evaluation.sampling import choose_prompts, stop_token_ids
from pipeline.evaluation.suite_rows import Suites
from pipeline.evaluation.task_figures import TaskFigures
from pipeline.files import write_json
from pipeline.harness.tasks import Tasks
from pipeline.model.limits import ModelLimits, check_rows, model_limits
from pipeline.params import EvaluateParams, ScoreParams
from pipeline.policies.answers import Answers, answer_rows
from pipeline.policies.engines import Needs, PolicyEngines
from pipeline.policies.identity import Policy


class Cell(NamedTuple):
    """One trained policy. beta: implicit reward per nat. metrics: JSON to write; answers: folder for Parquet."""

    variant: str
    seed: int
    beta: float
    policy: Path
    metrics: Path
    answers: Path | None = None

    @property
    def name(self) -> str:
        return f"{self.variant}-{self.seed}"


class Drawn(NamedTuple):
    """A model's answers to the sampled prompts: `n` consecutive rows (in the columns of responses) a prompt."""

    rows: pl.DataFrame
    n: int

    def by_prompt(self, values: Sequence[float]) -> np.ndarray:
        return np.asarray(values, dtype=np.float64).reshape(-1, self.n)


class Run:
    """What is asked of every model of one run, and what its answers come to."""

    def __init__(
        self,
        held_out: HeldOut,
        suites: Suites,
        base: Policy,
        params: EvaluateParams,
        engine: ScoreParams,
        trust_remote_code: bool,
    ) -> None:
        self._held_out, self._base, self._params, self._engine = held_out, base, params, engine
        self._trust_remote_code, self._suites = trust_remote_code, suites
        self._prompts = choose_prompts(held_out.responses, params.prompts)
        stop = stop_token_ids(base.folder, held_out.responses, trust_remote_code=trust_remote_code)
        self._sampling = Sampling(params.samples_per_prompt, params.max_new_tokens, stop_token_ids=tuple(stop))
        self._drawn: dict[Policy, Drawn] = {}
        tasks = Tasks(params, base.folder, stop_token_ids=stop, trust_remote_code=trust_remote_code)
        tasks.check()
        self._tasks = TaskFigures(tasks, base)

    def begin(self, engines: PolicyEngines, books: dict[Policy, Answers]) -> None:
        self._engines, self._books = engines, books
        engines.prepare(Needs(self._length(), self._tasks.tokenizer))

    def ask_all(self, policies: Sequence[Policy], failed: dict[str, Exception]) -> int:
        """Everything that is asked of the policies, then of the reference; returns how many had something to answer."""
        if len(self._prompts):
            self._drawn[self._base] = self._draw(self._base)
        self._measure_tasks(self._base)
        asked = 0
        for policy in policies:
            before = self._engines.starts + self._engines.exchanges + self._engines.adapted
            with Failing(policy.name, failed):
                self._ask(policy)
            asked += before != self._engines.starts + self._engines.exchanges + self._engines.adapted
        if self._drawn:
            answers = pl.concat([drawn.rows for drawn in self._drawn.values()])
            self._score(self._base, answers, "answers of all")
        return asked

    def _ask(self, policy: Policy) -> None:
        limits = model_limits(
            self._base.folder if policy.is_adapter else policy.folder, trust_remote_code=self._trust_remote_code
        )
        for rows in (self._held_out.responses, self._suites.responses):
            check_rows(rows, limits, policy.folder)
        self._score(policy, self._held_out.responses, "test responses")
        self._score(policy, self._suites.responses, "responses of suites")
        if len(self._prompts):
            drawn = self._drawn[policy] = self._draw(policy)
            self._score(
                policy, pl.concat([drawn.rows, self._drawn[self._base].rows]), "its and the reference's answers"
            )
        self._measure_tasks(policy)

    def _measure_tasks(self, who: Policy) -> None:
        self._tasks.measure(who, self._books[who], self._asker(who))

    def _draw(self, who: Policy) -> Drawn:
        prompts = token_arrays(self._prompts["prompt_ids"])
        seeds = self._sampling.seeds(self._params.seed, len(prompts))
        answers = self._books[who].draw(prompts, self._sampling, seeds, self._asker(who), "answers")
        return Drawn(answer_rows(self._prompts, answers), self._sampling.n)

    def _score(self, who: Policy, rows: pl.DataFrame, what: str) -> None:
        self._books[who].score(rows, self._asker(who), what)

    def _asker(self, who: Policy) -> Callable[[], EngineProcess]:
        return lambda: self._engines.use(who)

    def _length(self) -> EngineLength:
        limits = model_limits(self._base.folder, trust_remote_code=self._trust_remote_code)
        scored = (self._held_out.responses, self._suites.responses)
        longest = max(*map(longest_row, scored), self._longest_sample(limits), self._tasks.longest)
        return engine_length(
            longest, limits, self._engine, what="test responses, answers and tasks, with their prompts,"
        )

    def _longest_sample(self, limits: ModelLimits) -> int:
        if self._prompts.is_empty():
            return 0
        longest = longest_prompt(self._prompts) + self._params.max_new_tokens
        if limits.positions is not None and longest > limits.positions:
            raise RequestError(
                f"evaluate.max_new_tokens is {self._params.max_new_tokens} and a prompt has "
                f"{longest - self._params.max_new_tokens} tokens, "
                f"but the model has {limits.positions} positions. "
                f"Set it to {limits.positions - longest + self._params.max_new_tokens} or less."
            )
        return longest

    # what it comes to -------------------------------------------------------------------------------------------------

    def write(self, cell: Cell, policy: Policy) -> dict[str, Any]:
        test, beta = self._held_out.pairs, cell.beta
        values = self._pair_values(policy)
        content = {
            "variant": cell.variant,
            "seed": cell.seed,
            "split": "test",
            "pairs": len(test),
            **pair_metrics(values, beta=beta),
            **self._sample_metrics(policy),
            "reference": reference_metrics(values),
            **self._tasks.of(policy),
        }
        categories = category_metrics(values, test["category"].to_list(), beta=beta)
        if categories:
            content["categories"] = categories
        if suites := self._suites.metrics(self._books[policy].sums(), beta=beta):
            content["suites"] = suites
        if cell.answers is not None:
            if self._drawn:
                self._write_answers(policy, cell.answers)
            self._tasks.write_answers(policy, cell.answers)
        write_json(cell.metrics, content)
        return content

    def _pair_values(self, policy: Policy) -> PairValues:
        test, responses = self._held_out.pairs, self._held_out.responses
        sums = self._books[policy].sums()
        tokens = dict(zip(responses["response_key"], responses["response_ids"].list.len(), strict=True))
        chosen, rejected = test["chosen_key"], test["rejected_key"]
        return PairValues(
            chosen=np.array([sums[key] for key in chosen]),
            rejected=np.array([sums[key] for key in rejected]),
            ref_chosen=self._held_out.cached.sum_logps(chosen),
            ref_rejected=self._held_out.cached.sum_logps(rejected),
            chosen_tokens=np.array([tokens[key] for key in chosen], dtype=np.int64),
        )

    def _sample_metrics(self, policy: Policy) -> dict[str, Any]:
        """kl: mean of log pi_theta - log pi_ref over the policy's answers, nats; clustered by prompt."""
        if not self._drawn:
            return {"kl": None, "kl_standard_error": None, "samples": 0}
        drawn, own, theirs = self._drawn[policy], self._books[policy].sums(), self._books[self._base].sums()
        kl = drawn.by_prompt([own[key] - theirs[key] for key in drawn.rows["response_key"]])
        mean, error = mean_over_prompts(kl)
        found: dict[str, Any] = {"kl": mean, "kl_standard_error": error, "samples": kl.size}
        rewards = {name: self._true_rewards(who) for name, who in (("policy", policy), ("reference", self._base))}
        if all(values is not None for values in rewards.values()):
            expected = found["expected_reward"] = {}
            for name, values in rewards.items():
                assert values is not None
                expected[name], expected[f"{name}_standard_error"] = mean_over_prompts(drawn.by_prompt(values))
        return found

    def _true_rewards(self, who: Policy) -> list[float] | None:
        return true_rewards(self._drawn[who].rows, self._held_out.responses, self._base.folder, self._trust_remote_code)

    def _write_answers(self, policy: Policy, folder: Path) -> None:
        tables = [
            answers_table(
                self._drawn[who].rows,
                author=author,
                n=self._sampling.n,
                policy=self._books[policy].sums(),
                reference=self._books[self._base].sums(),
                rewards=self._true_rewards(who),
                tokenizer=self._base.folder,
                trust_remote_code=self._trust_remote_code,
            )
            for author, who in (("policy", policy), ("reference", self._base))
        ]
        folder.mkdir(parents=True, exist_ok=True)
        pl.concat(tables).write_parquet(folder / "samples.parquet")
