"""What a sweep costs with the reference cache, and what scoring the reference anew for every cell would add.

Measured on the sweep's first cell, from empty work folders, each stage as its own process as DVC runs it.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stages.options import params_file_options, path_option

if TYPE_CHECKING:
    from pipeline.params import Params

Cost = dict[str, float]  # wall and cpu, seconds


@click.command()
@path_option("--pairs", "Folder of pairs and responses from prepare.")
@path_option("--model", "Reference model from sft.")
@path_option("--reference", "Reference cache from score.")
@path_option("--out", "JSON file to write.")
@params_file_options
def command(
    params_file: Path, overrides: tuple[str, ...], pairs: Path, model: Path, reference: Path, out: Path
) -> None:
    """Time one `score` and one `train` of the first cell, and the forwards that an online reference would need."""
    from pipeline.files import write_json
    from pipeline.params import load_params

    params = load_params(params_file, overrides)
    variant, seed = params.sweep.variants[0], params.sweep.seeds[0]
    given = ["--params", str(params_file), *(word for override in overrides for word in ("--set", override))]
    given += ["--pairs", str(pairs), "--model", str(model)]
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        made = ["--out", str(scratch / "policy"), "--history", str(scratch / "history.tsv")]
        cell = ["--variant", variant, "--seed", str(seed), "--reference", str(reference)]
        metrics = ["--metrics", str(scratch / "metrics.json")]
        train = run_stage(["train", *given, *cell, *made, *metrics], scratch / "work")
        score = run_stage(["score", *given, "--out", str(scratch / "logps"), *metrics], scratch / "work")
        rows = json.loads((scratch / "metrics.json").read_text())["rows_scored"]
    content: dict[str, Any] = {
        "cell": f"{variant}-{seed}",
        "train": train,
        "score": score | {"rows": rows},
        "online": online_reference(params, pairs, model, seed),
    }
    write_json(out, content)
    cells = len(params.sweep.variants) * len(params.sweep.seeds)
    click.echo(describe(content, cells))


def run_stage(words: list[str], home: Path) -> Cost:
    """Wall and CPU seconds of one stage with all its processes; nothing of earlier runs is reused."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "stages", *words], check=True, env=os.environ | {"REFCACHE_HOME": str(home)})
    wall = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {"wall": wall, "cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}


def online_reference(params: "Params", pairs: Path, model: Path, seed: int) -> Cost:
    """Wall and CPU seconds of forwarding the reference on every batch of the cell, in the trainer's own layout."""
    import torch

    from pipeline.forward.layout import choose_layout
    from pipeline.forward.logps import ResponseLogps
    from pipeline.tokens.examples import open_examples
    from pipeline.training.batches import batch_indices, micro_batches, steps_for
    from pipeline.training.loop import ordered_groups
    from pipeline.training.pairs import PairBatches
    from studies.measure.policies import load_model

    loop, loaded = params.train, load_model(model)
    table = PairBatches(open_examples(pairs, "train"), choose_layout(loaded, loop.layout, best="shared_prompts"))
    forward = ResponseLogps(loaded, loop.logps_chunk_tokens)
    started, cpu = time.perf_counter(), time.process_time()
    with torch.inference_mode():
        for step in range(steps_for(loop.epochs, len(table), loop.batch_size)):
            batch = batch_indices(
                step,
                seed=seed,
                n_examples=len(table),
                batch_size=loop.batch_size,
                groups=ordered_groups(table.groups, loop),
            )
            for micro in micro_batches(
                batch,
                table.groups,
                table.tokens,
                rank=0,
                ranks=1,
                micro_batch_size=loop.micro_batch_size,
                tokens_per_batch=loop.tokens_per_batch,
            ):
                tokens, _ = table.batch(micro)
                forward(*tokens.to(loaded.device)).sum().item()
    return {"wall": time.perf_counter() - started, "cpu": time.process_time() - cpu}


def describe(content: dict[str, Cost], cells: int) -> str:
    """One line for the terminal."""
    from studies.pages.runs import sweep_totals

    whole = sweep_totals(content, cells)
    return (
        f"cost of {cells} cells: {whole['cached']['wall']:,.0f} s with the reference cache, "
        f"{whole['anew']['wall']:,.0f} s scoring the reference anew for each, "
        f"{whole['online']['wall']:,.0f} s forwarding it in training (measured on {content['cell']})"
    )


if __name__ == "__main__":
    command()
