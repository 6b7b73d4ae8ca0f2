"""True reward and KL(policy || reference) of answers drawn from every policy of a class, in one process.

`evaluate` starts vLLM, which for small models costs far more than the work itself. What it
measures is the same: answers at temperature 1 over the whole vocabulary to held-out prompts, and `true_reward` of their
text. KL is divergence.py's. Policies of one seed draw with the same random numbers, so that their differences
are less noisy than their means: torch.multinomial takes whichever token's exponential clock, divided by its
probability, rings first, and where two policies give alike probabilities the same one does.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from stages.options import params_options, path_option

if TYPE_CHECKING:
    import polars as pl
    from torch import Tensor

    from pipeline.params import EvaluateParams, Params

PROMPTS = 40  # in one batch, times samples_per_prompt
SEEDS = 1 << 20  # random streams between two values of evaluate.seed, and between two seeds of a policy


class Scale(NamedTuple):
    """What all policies are measured against: the reference, held-out prompts, the tokens that end an answer."""

    reference: Any
    prompts: "pl.DataFrame"
    stop: list[int]
    tokenizer: Any
    settings: "EvaluateParams"


@click.command()
@path_option("--pairs", "Folder of pairs and responses from prepare; the demo's.")
@path_option("--model", "Reference model from sft.")
@path_option("--policies", "Folder of <variant>-<seed>/ policies.")
@path_option("--out", "Parquet file to write: one row per policy and held-out prompt.")
@params_options
def command(params: "Params", pairs: Path, model: Path, policies: Path, out: Path) -> None:
    """Write variant, seed, split, prompt_key and, as means over a prompt's answers, reward and kl (nats an answer).

    The reference's own answers are written too, as variant "reference", with the random numbers of each seed.
    """
    import polars as pl

    from pipeline.data.tables import read_responses
    from pipeline.evaluation.sampling import choose_prompts, stop_token_ids
    from pipeline.model.tokenizer import open_tokenizer
    from pipeline.trainable.merging import loadable
    from studies.measure.policies import load_model
    from studies.pages.runs import REFERENCE

    responses = read_responses(pairs).filter(pl.col("split") == "test")
    prompts = choose_prompts(responses, params.evaluate.prompts)
    stop = stop_token_ids(model, responses)
    scale = Scale(load_model(model), prompts, stop, open_tokenizer(model), params.evaluate)
    tables = [measure(scale.reference, scale, REFERENCE, seed) for seed in params.sweep.seeds]
    for name in params.sweep.variants:
        for seed in params.sweep.seeds:
            with loadable(policies / f"{name}-{seed}", model) as folder:
                tables.append(measure(load_model(folder), scale, name, seed))
    out.parent.mkdir(parents=True, exist_ok=True)
    pl.concat(tables).write_parquet(out)
    click.echo(f"answers: {len(tables) - len(params.sweep.seeds)} policies on {len(prompts):,} prompts")


def measure(policy: Any, scale: Scale, variant: str, seed: int) -> "pl.DataFrame":
    """One row a prompt: variant, seed, split, prompt_key, reward, kl (0 for the reference itself)."""
    import polars as pl
    import torch

    from studies.measure.divergence import answer_divergences, draw_answers, pad_left

    n = scale.settings.samples_per_prompt
    reward: list[float] = []
    kl: list[float] = []
    with torch.inference_mode():
        for start in range(0, len(scale.prompts), PROMPTS):
            # Anew for every batch: how many numbers the one before it took depends on how long its answers were.
            torch.manual_seed((scale.settings.seed * SEEDS + seed) * SEEDS + start)
            part = scale.prompts[start : start + PROMPTS]
            repeated = [ids.to_list() for ids in part["prompt_ids"] for _ in range(n)]
            batch = pad_left(repeated, policy.device)
            answers = draw_answers(policy, batch, scale.stop, scale.settings.max_new_tokens)
            reward += true_rewards(part["prompt_text"].to_list(), answers, scale)
            if policy is scale.reference:
                kl += [0.0] * len(part)
            else:
                values = answer_divergences(policy, scale.reference, batch, answers, scale.stop)
                kl += values.reshape(-1, n).mean(dim=1).tolist()
    columns = [pl.lit(variant).alias("variant"), pl.lit(seed).alias("seed"), pl.lit("test").alias("split")]
    return scale.prompts.select("prompt_key").with_columns(*columns, pl.Series("reward", reward), pl.Series("kl", kl))


def true_rewards(prompts: list[str], answers: "Tensor", scale: Scale) -> list[float]:
    """The mean over each prompt's answers, (P,). answers: (P * samples_per_prompt, A), the prompts' in turn."""
    import numpy as np

    from pipeline.data.demo import true_reward

    n = scale.settings.samples_per_prompt
    texts = scale.tokenizer.batch_decode([ended(row, scale.stop) for row in answers.tolist()], skip_special_tokens=True)
    values = [true_reward(prompts[row // n], text) for row, text in enumerate(texts)]
    return [float(mean) for mean in np.reshape(values, (-1, n)).mean(axis=1)]


def ended(answer: list[int], stop: list[int]) -> list[int]:
    """The answer up to and with its first token of `stop`; what was drawn beyond belongs to no answer."""
    ends = [place for place, token in enumerate(answer) if token in stop]
    return answer[: ends[0] + 1] if ends else answer


if __name__ == "__main__":
    command()
