"""KL(policy || reference) of answers drawn from each policy, in one process.

By the chain rule the divergence of whole answers is the expected sum, over the policy's own answers, of the divergence
of the next token. Each summand is taken over the whole vocabulary, which has the mean of the usual estimator (the
answer's log-ratio) and less spread, and is never negative. Answers are cut at evaluate.max_new_tokens.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from stages.options import params_options, path_option

if TYPE_CHECKING:
    import polars as pl
    from torch import Tensor

    from pipeline.params import Params

PROMPTS = 16  # in one batch, times samples_per_prompt
NUMBERS = 2**26  # of a model's next-token log-probs that exist at once


class Prompts(NamedTuple):
    """Token ids (N, P), padded on the left, and 1 where a token is the prompt's."""

    ids: "Tensor"
    mask: "Tensor"


@click.command()
@path_option("--pairs", "Folder of pairs and responses from prepare.")
@path_option("--model", "Reference model from sft.")
@path_option("--policies", "Folder of <variant>-<seed>/ policies.")
@path_option("--out", "Parquet file to write: one row per policy and prompt.")
@params_options
def command(params: "Params", pairs: Path, model: Path, policies: Path, out: Path) -> None:
    """Write variant, seed, split, prompt_key and kl (nats an answer, mean over samples_per_prompt answers)."""
    import polars as pl

    from pipeline.data.tables import read_responses
    from pipeline.evaluation.sampling import choose_prompts, stop_token_ids
    from studies.measure.policies import load_model

    responses = read_responses(pairs)
    stop = stop_token_ids(model, responses)
    splits = {name: choose_prompts(part, params.evaluate.prompts) for name, part in _by_split(responses).items()}
    reference = load_model(model)
    rows = []
    for name in params.sweep.variants:
        for seed in params.sweep.seeds:
            policy = load_model(policies / f"{name}-{seed}")
            for split, prompts in splits.items():
                values = _prompt_divergences(policy, reference, prompts, stop, params)
                columns = [pl.lit(name).alias("variant"), pl.lit(seed).alias("seed"), pl.lit(split).alias("split")]
                rows.append(prompts.select("prompt_key").with_columns(*columns, pl.Series("kl", values)))
    out.parent.mkdir(parents=True, exist_ok=True)
    pl.concat(rows).write_parquet(out)
    click.echo(f"divergence: {len(params.sweep.variants) * len(params.sweep.seeds)} policies")


def _by_split(responses: "pl.DataFrame") -> dict[str, "pl.DataFrame"]:
    return {str(name): part for (name,), part in responses.partition_by("split", as_dict=True).items()}


def _prompt_divergences(
    policy: Any, reference: Any, prompts: "pl.DataFrame", stop: list[int], params: "Params"
) -> list[float]:
    """Nats an answer, one mean per prompt."""
    import torch

    settings = params.evaluate
    n = settings.samples_per_prompt
    torch.manual_seed(settings.seed)
    found: list[float] = []
    with torch.inference_mode():
        for start in range(0, len(prompts), PROMPTS):
            ids = [ids.to_list() for ids in prompts["prompt_ids"][start : start + PROMPTS]]
            batch = pad_left([each for each in ids for _ in range(n)], policy.device)
            answers = draw_answers(policy, batch, stop, settings.max_new_tokens)
            values = answer_divergences(policy, reference, batch, answers, stop)
            found += values.reshape(-1, n).mean(dim=1).tolist()
    return found


def pad_left(prompts: Sequence[Sequence[int]], device: Any = "cpu") -> "Prompts":
    """On the left, so that all answers begin in one column; the pads are masked and have no position."""
    import torch

    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return Prompts(ids.to(device), mask.to(device))


def draw_answers(policy: Any, prompts: "Prompts", stop: list[int], max_new_tokens: int) -> "Tensor":
    """An answer to each of N prompts at temperature 1 over the whole vocabulary, (N, at most max_new_tokens)."""
    import torch

    ids, mask, cached = prompts.ids, prompts.mask, None
    ends = torch.tensor(stop, device=ids.device)
    done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    drawn: list[Tensor] = []
    while len(drawn) < max_new_tokens and not done.all():
        positions = _positions(mask)[:, -ids.shape[1] :]
        step = policy(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cached,
            use_cache=True,
            logits_to_keep=1,
        )
        ids = torch.multinomial(step.logits[:, -1].softmax(-1), 1)
        mask, cached = torch.cat([mask, torch.ones_like(ids)], dim=1), step.past_key_values
        drawn.append(ids)
        done |= torch.isin(ids[:, 0], ends)
    return torch.cat(drawn, dim=1)


def answer_divergences(policy: Any, reference: Any, prompts: "Prompts", answers: "Tensor", stop: list[int]) -> "Tensor":
    """Sum over an answer's tokens of KL(policy || reference) of the next token, nats, (N,).

    answers: (N, A), where whatever follows an end-of-turn token is no part of the answer.
    """
    import torch

    ids = torch.cat([prompts.ids, answers], dim=1)
    mask = torch.cat([prompts.mask, torch.ones_like(answers)], dim=1)
    rows = max(1, NUMBERS // (answers.shape[1] * policy.config.vocab_size))
    per_token = torch.cat(
        [
            _next_token_divergences(policy, reference, *part, answers.shape[1])
            for part in zip(ids.split(rows), mask.split(rows), strict=True)
        ]
    )
    ended = torch.isin(answers, torch.tensor(stop, device=answers.device)).long()
    belongs = ended.cumsum(dim=1) - ended == 0  # nothing has ended before it
    return (per_token * belongs).sum(dim=1)


def _next_token_divergences(policy: Any, reference: Any, ids: "Tensor", mask: "Tensor", tokens: int) -> "Tensor":
    """KL(policy || reference) at the positions that predict the last `tokens` of `ids` (N, L), nats, (N, tokens)."""
    ours, theirs = (
        model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=_positions(mask),
            use_cache=False,
            logits_to_keep=tokens + 1,
        )
        .logits[:, :-1]
        .double()
        .log_softmax(-1)
        for model in (policy, reference)
    )
    found: Tensor = (ours.exp() * (ours - theirs)).sum(-1)
    return found


def _positions(mask: "Tensor") -> "Tensor":
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


if __name__ == "__main__":
    command()
