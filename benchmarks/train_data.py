"""What a training rank holds before its model, and what it costs to draw its batches; for benchmarks/pipeline_scale.py.

    python benchmarks/train_data.py stage PAIRS REFERENCE JOB     what the stage does once, for all ranks
    python benchmarks/train_data.py rank PAIRS REFERENCE JOB      one rank: the task, and the batches of BATCHES steps

With the packages of a rank imported. On a checkout from before the mapped examples a rank does the stage's part, too.
"""

import json
import sys
from pathlib import Path

import numpy as np

from cache import open_reference
from pipeline.training import rank  # noqa: F401  # torch and DeepSpeed, as a rank has them
from pipeline.training.batches import batch_indices, micro_batches
from pipeline.training.preference_task import PreferenceTask

BATCHES, BATCH_SIZE, TOKENS_PER_BATCH = 200, 64, 16384
TASK = {"hyperparameters": {"beta": 0.1}, "objective": "dpo", "reward_beta": 0.1, "drift_tolerance": 1.0}


def stage(pairs: Path, reference: Path, job: Path) -> None:
    try:
        from pipeline.tokens.examples import open_examples, with_reference_sums
    except ImportError:
        return
    found = with_reference_sums(open_examples(pairs, "train"), open_reference(reference, expect=None))
    job.write_text(json.dumps(found.places))


def open_task(pairs: Path, reference: Path, job: Path) -> PreferenceTask:
    try:
        from pipeline.tokens.examples import Examples, Places
    except ImportError:
        return PreferenceTask(pairs, reference, **TASK, layout="shared_prompts")
    return PreferenceTask(
        Examples(Places(*json.loads(job.read_text()))), pairs, reference, **TASK, layout="shared_prompts"
    )


def draw_batches(task: PreferenceTask) -> int:
    """Tokens of what one of eight ranks forwards in BATCHES steps."""
    tokens = 0
    for step in range(BATCHES):
        batch = batch_indices(step, seed=0, n_examples=len(task.lengths), batch_size=BATCH_SIZE)
        settings = {"rank": 0, "ranks": 8, "micro_batch_size": 2, "tokens_per_batch": TOKENS_PER_BATCH}
        for micro in micro_batches(batch, task.groups, task.tokens, **settings):
            tokens += int(task.pairs.batch(micro)[0].input_ids.numel())
            assert np.isfinite(task.reference_logps[micro]).all()
    return tokens


def main() -> None:
    what, paths = sys.argv[1], [Path(path) for path in sys.argv[2:]]
    if what == "stage":
        stage(*paths)
    else:
        print(draw_batches(open_task(*paths)))


if __name__ == "__main__":
    main()
