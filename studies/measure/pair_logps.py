"""Every policy of a study on every pair, in one process: summed log-probs by the trainer's own forward.

`evaluate` starts vLLM, which for small models costs far more than the work itself.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from stages.options import params_options, path_option

if TYPE_CHECKING:
    import polars as pl

    from pipeline.params import Params

PROMPTS = 2000  # of a split at most, a random sample: more would narrow no interval that matters
BATCH = 32  # responses in one forward
CHUNK_TOKENS = 2048  # of them, whose logits exist at once


@click.command()
@path_option("--pairs", "Folder of pairs and responses from prepare.")
@path_option("--model", "Reference model from sft.")
@path_option("--reference", "Reference cache from score.")
@path_option("--policies", "Folder of <variant>-<seed>/ policies.")
@path_option("--out", "Parquet file to write: one row per policy and pair.")
@click.option("--split", "splits", multiple=True, required=True, help="train or test; repeatable.")
@params_options
def command(
    params: "Params", pairs: Path, model: Path, reference: Path, policies: Path, out: Path, splits: tuple[str, ...]
) -> None:
    """Write variant, seed, split, prompt_key and, in nats, chosen, rejected, ref_chosen, ref_rejected of pairs.

    The reference's own forward is written too, as variant "reference", seed 0: its distance from the reference cache
    is what rounding leaves.
    """
    import polars as pl

    from pipeline.data.tables import read_pairs, read_responses
    from pipeline.evaluation.sampling import choose_prompts
    from pipeline.reference.identity import open_for_model
    from pipeline.trainable.merging import loadable

    everything = read_responses(pairs)
    prompts = [choose_prompts(everything.filter(pl.col("split") == split), PROMPTS)["prompt_key"] for split in splits]
    sampled = pl.col("prompt_key").is_in(pl.concat(prompts).implode())
    table, responses = read_pairs(pairs).filter(sampled), everything.filter(sampled)
    cached = open_for_model(reference, model)
    columns = table.select("split", "prompt_key", "pair_id").with_columns(
        pl.Series("ref_chosen", cached.sum_logps(table["chosen_key"])),
        pl.Series("ref_rejected", cached.sum_logps(table["rejected_key"])),
        pl.Series("chosen_tokens", _lengths(table["chosen_key"], responses)),
    )
    cells = [("reference", 0, model)]
    cells += [
        (name, seed, policies / f"{name}-{seed}") for name in params.sweep.variants for seed in params.sweep.seeds
    ]
    rows = []
    for name, seed, folder in cells:
        with loadable(folder, model) as whole:  # of an adapter, merged with the reference
            sums = response_sums(whole, responses)
        rows.append(
            columns.with_columns(
                pl.lit(name).alias("variant"),
                pl.lit(seed).alias("seed"),
                pl.Series("chosen", [sums[key] for key in table["chosen_key"]]),
                pl.Series("rejected", [sums[key] for key in table["rejected_key"]]),
            )
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    pl.concat(rows).write_parquet(out)
    click.echo(f"pair_logps: {len(cells)} models on {len(table):,} pairs, {len(responses):,} responses")


def response_sums(model: Path, responses: "pl.DataFrame") -> dict[bytes, float]:
    """Summed log-prob of every response by its key, nats; `responses`: columns of prepare's responses."""
    import torch

    from pipeline.forward.logps import ResponseLogps, collate, sequence_sums
    from studies.measure.policies import load_model

    loaded = load_model(model)
    forward = ResponseLogps(loaded, CHUNK_TOKENS)
    prompts = [ids.to_numpy() for ids in responses["prompt_ids"]]
    answers = [ids.to_numpy() for ids in responses["response_ids"]]
    order = sorted(range(len(responses)), key=lambda row: len(prompts[row]) + len(answers[row]))
    keys = responses["response_key"].to_list()
    found: dict[bytes, float] = {}
    with torch.inference_mode():
        for start in range(0, len(order), BATCH):
            chunk = order[start : start + BATCH]
            tokens = collate([(prompts[row], answers[row]) for row in chunk]).to(loaded.device)
            sums = sequence_sums(forward(*tokens), tokens.rows, len(chunk))
            found |= zip([keys[row] for row in chunk], sums.tolist(), strict=True)
    return found


def _lengths(keys: "pl.Series", responses: "pl.DataFrame") -> list[int]:
    lengths = dict(zip(responses["response_key"], responses["response_ids"].list.len(), strict=True))
    return [lengths[key] for key in keys]


if __name__ == "__main__":
    command()
