"""Compare one policy with the reference on held-out pairs, and on answers that vLLM draws from the policy."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from cache import Reference, open_reference, response_key
from pipeline.data.tables import read_pairs, read_responses
from pipeline.engine.process import EngineProcess, orderly_termination
from pipeline.engine.rows import (
    EngineLength,
    calls,
    engine_length,
    engine_rows,
    longest_row,
    scoring_order,
    token_arrays,
)
from pipeline.errors import RequestError
from pipeline.evaluation.metrics import (
    Floats,
    PairValues,
    category_metrics,
    mean_over_prompts,
    pair_metrics,
    reference_metrics,
)
from pipeline.evaluation.sampling import choose_prompts, stop_token_ids
from pipeline.files import write_json
from pipeline.model.limits import ModelLimits, check_rows, model_limits
from pipeline.model.tokenizer import open_tokenizer
from pipeline.params import EvaluateParams, ScoreParams
from pipeline.progress import progress_bar
from pipeline.reference.identity import reference_identity
from pipeline.trainable.merging import loadable
from pipeline.workspace import log_file


class _Samples(NamedTuple):
    """Answers to the sampled prompts: `n` consecutive rows (in the columns of responses) a prompt."""

    rows: pl.DataFrame
    n: int

    def by_prompt(self, values: Sequence[float] | Floats) -> Floats:
        return np.asarray(values, dtype=np.float64).reshape(-1, self.n)


def evaluate_policy(
    *,
    variant: str,
    seed: int,
    pairs: Path,
    reference_model: Path,
    policy: Path,
    reference: Path,
    metrics: Path,
    params: EvaluateParams,
    engine: ScoreParams,
    beta: float,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Write evaluate.json for the policy of one cell and return its content.

    engine: the score section, so that policy and reference are computed alike. beta: implicit reward per nat. Two
    engines start, one after the other. Raises RequestError before they load for an empty test split or rows that the
    model can't take, CacheMismatch or CacheIncomplete if `reference` isn't the scored reference_model, RunFailed if an
    engine dies.
    """
    test = read_pairs(pairs, "test")
    if test.is_empty():
        raise RequestError(
            f"{pairs} has no test pairs, so there is nothing to evaluate on. Set prepare.test_share above 0, or name "
            "prepare.files.test_pairs or prepare.hub.test_split (beside unpaired feedback: pairs), and run `dvc repro`."
        )
    responses = read_responses(pairs).filter(pl.col("split") == "test")
    identity = reference_identity(reference_model, dtype=engine.dtype, quantization=engine.quantization)
    cached = open_reference(reference, expect=identity)
    cached.rows(responses["response_key"], ["sum_logp"])  # incomplete? say so before minutes of sampling
    cell = _Cell(f"{variant}-{seed}", engine, params, reference_model, trust_remote_code)
    with orderly_termination(), loadable(policy, reference_model, trust_remote_code=trust_remote_code) as folder:
        sums, sampled = cell.run(folder, responses)
    values = _pair_values(test, responses, sums, cached)
    content = {
        "variant": variant,
        "seed": seed,
        "split": "test",
        "pairs": len(test),
        **pair_metrics(values, beta=beta),
        **sampled,
        "reference": reference_metrics(values),
    }
    categories = category_metrics(values, test["category"].to_list(), beta=beta)
    if categories:
        content["categories"] = categories
    write_json(metrics, content)
    return content


class _Cell(NamedTuple):
    """The engine work of one cell."""

    name: str
    engine: ScoreParams
    params: EvaluateParams
    reference_model: Path
    trust_remote_code: bool

    def run(self, policy: Path, responses: pl.DataFrame) -> tuple[dict[bytes, float], dict[str, Any]]:
        """Summed log-probs of `responses` under the policy by key, and the metrics of sampled answers."""
        prompts = choose_prompts(responses, self.params.prompts)
        with ExitStack() as stack:
            # Both processes import vLLM at once; their models are loaded one after the other.
            policy_engine = stack.enter_context(self._start("policy"))
            reference_engine = stack.enter_context(self._start("reference")) if len(prompts) else None
            length = self._length(policy, responses, prompts)
            stop = stop_token_ids(self.reference_model, responses, trust_remote_code=self.trust_remote_code)
            policy_engine.load(policy, length, sampling=True, trust_remote_code=self.trust_remote_code)
            sums = self._score(policy_engine, responses, "policy")
            if reference_engine is None:
                return sums, _sample_metrics(None)
            samples = self._sample(policy_engine, prompts, stop, "policy")
            own = self._score(policy_engine, samples.rows, "policy on its answers")
            policy_engine.close()  # its memory is the other's
            reference_engine.load(self.reference_model, length, sampling=True, trust_remote_code=self.trust_remote_code)
            theirs = self._score(reference_engine, samples.rows, "reference on them")
            rewards = None
            if _is_demo(responses, prompts):
                baseline = self._sample(reference_engine, prompts, stop, "reference")
                tokenizer = open_tokenizer(self.reference_model, trust_remote_code=self.trust_remote_code)
                rewards = _expected_reward(samples, baseline, tokenizer)
        kl = samples.by_prompt([own[key] - theirs[key] for key in samples.rows["response_key"]])
        return sums, _sample_metrics(kl, rewards)

    def _start(self, who: str) -> EngineProcess:
        return EngineProcess(self.engine, log=log_file(f"evaluate-{self.name}-{who}"))

    def _length(self, policy: Path, responses: pl.DataFrame, prompts: pl.DataFrame) -> EngineLength:
        limits = model_limits(policy, trust_remote_code=self.trust_remote_code)
        check_rows(responses, limits, policy)
        longest = max(longest_row(responses), self._longest_sample(prompts, limits))
        return engine_length(longest, limits, self.engine, what="test responses and answers, with their prompts,")

    def _longest_sample(self, prompts: pl.DataFrame, limits: ModelLimits) -> int:
        if prompts.is_empty():
            return 0
        longest_prompt = prompts["prompt_ids"].list.len().max()
        assert isinstance(longest_prompt, int)
        longest = longest_prompt + self.params.max_new_tokens
        if limits.positions is not None and longest > limits.positions:
            raise RequestError(
                f"evaluate.max_new_tokens is {self.params.max_new_tokens} and a prompt has {longest_prompt} tokens, "
                f"but the model has {limits.positions} positions. "
                f"Set it to {limits.positions - longest_prompt} or less."
            )
        return longest

    def _score(self, engine: EngineProcess, rows: pl.DataFrame, what: str) -> dict[bytes, float]:
        """Summed log-prob by response_key, nats, float64; a row that comes twice is scored once."""
        ordered = scoring_order(rows.unique("response_key"))
        sums: dict[bytes, float] = {}
        with progress_bar(f"{self.name}: {what}", len(ordered)) as advance:
            for call in calls(ordered, self.engine.rows_per_call):
                logps = engine.score(engine_rows(call), advance).logps
                sums |= zip(
                    call["response_key"], (float(values.sum(dtype=np.float64)) for values in logps), strict=True
                )
        return sums

    def _sample(self, engine: EngineProcess, prompts: pl.DataFrame, stop: list[int], who: str) -> _Samples:
        n = self.params.samples_per_prompt
        with progress_bar(f"{self.name}: answers of the {who}", len(prompts) * n) as advance:
            answers = engine.generate(
                token_arrays(prompts["prompt_ids"]),
                advance,
                n=n,
                max_new_tokens=self.params.max_new_tokens,
                seed=self.params.seed,
                stop_token_ids=stop,
            )
        flat = [answer for of_prompt in answers for answer in of_prompt]
        rows = prompts[np.repeat(np.arange(len(prompts)), n)].with_columns(
            pl.Series("response_ids", flat, dtype=pl.List(pl.Int32))
        )
        keys = [
            response_key(prompt, answer)
            for prompt, answer in zip(token_arrays(rows["prompt_ids"]), token_arrays(rows["response_ids"]), strict=True)
        ]
        return _Samples(rows.with_columns(pl.Series("response_key", keys, dtype=pl.Binary)), n)


def _pair_values(
    test: pl.DataFrame, responses: pl.DataFrame, sums: dict[bytes, float], cached: Reference
) -> PairValues:
    tokens = dict(zip(responses["response_key"], responses["response_ids"].list.len(), strict=True))
    chosen, rejected = test["chosen_key"], test["rejected_key"]
    return PairValues(
        chosen=np.array([sums[key] for key in chosen]),
        rejected=np.array([sums[key] for key in rejected]),
        ref_chosen=cached.sum_logps(chosen),
        ref_rejected=cached.sum_logps(rejected),
        chosen_tokens=np.array([tokens[key] for key in chosen], dtype=np.int64),
    )


def _sample_metrics(kl: Floats | None, rewards: dict[str, Any] | None = None) -> dict[str, Any]:
    """kl: log pi_theta - log pi_ref of each answer, nats, (n_prompts, samples_per_prompt)."""
    if kl is None:
        return {"kl": None, "kl_standard_error": None, "samples": 0}
    mean, error = mean_over_prompts(kl)
    found: dict[str, Any] = {"kl": mean, "kl_standard_error": error, "samples": kl.size}
    return found | ({"expected_reward": rewards} if rewards else {})


def _is_demo(responses: pl.DataFrame, prompts: pl.DataFrame) -> bool:
    """Whether the true reward of any answer is known: annotated rewards, and prompts of the generated dataset."""
    from pipeline.data.demo import solve

    if responses["reward"].null_count():
        return False
    try:
        for text in prompts["prompt_text"]:
            solve(text)
    except ValueError:
        return False
    return True


def _expected_reward(policy: _Samples, reference: _Samples, tokenizer: Any) -> dict[str, Any]:
    from pipeline.data.demo import true_reward

    found: dict[str, Any] = {}
    for name, samples in (("policy", policy), ("reference", reference)):
        texts = tokenizer.batch_decode(samples.rows["response_ids"].to_list(), skip_special_tokens=True)
        rewards = [true_reward(prompt, text) for prompt, text in zip(samples.rows["prompt_text"], texts, strict=True)]
        found[name], found[f"{name}_standard_error"] = mean_over_prompts(samples.by_prompt(rewards))
    return found
