"""TRL's DPOTrainer on prepared pairs, step by step, timed.

    python benchmarks/train_peers.py online|precompute --pairs DIR --model DIR --dtype float32 --batch-size 8 \\
        --steps 4 --micro-batch-sizes 1 2 4 --learning-rate 1e-5 --beta 0.1 --out FILE

The same token ids, global batches in the same order, optimizer and learning rate as `refcache train` with a constant
schedule. The micro-batch size that is fastest on the first batch is taken. Writes JSON: seconds, loss and gradient norm
of every step, pairs of a micro-batch, seconds of the precompute; on a GPU the most bytes that tensors held after the
first step.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from score_peers import Pair, load_pairs, tokenizer_of
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.utils import logging

from pipeline.tokens.examples import open_examples
from pipeline.training.batches import batch_indices


class StepTimes(TrainerCallback):  # type: ignore[misc]
    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._started = 0.0

    def on_step_begin(self, *arguments: Any, **options: Any) -> None:
        self._started = now()

    def on_step_end(self, *arguments: Any, **options: Any) -> None:
        self.seconds.append(now() - self._started)
        if len(self.seconds) == 1 and torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()


def now() -> float:
    """When all that a GPU was told is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def train(
    pairs: list[Pair],
    options: argparse.Namespace,
    *,
    micro: int,
    steps: int,
    method: str,
    attention: str = "sdpa",
    **settings: Any,
) -> dict[str, Any]:
    """The first `steps` batches of `refcache train` with seed 0, in micro-batches of `micro` pairs.

    settings: of DPOConfig, beyond those that make it train what refcache trains. attention: as transformers calls it.
    """
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from trl import DPOConfig, DPOTrainer

    class Timed(DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *rest: Any, **settings: Any) -> Any:
            return dataset  # tokenised already, with the ids that everybody gets

        def _get_train_sampler(self, *arguments: Any) -> Any:
            return SequentialSampler(self.train_dataset)

    groups = open_examples(options.pairs, "train").groups if options.batch_order == "prompts" else None
    order = [
        int(index)
        for step in range(steps)
        for index in batch_indices(step, seed=0, n_examples=len(pairs), batch_size=options.batch_size, groups=groups)
    ]
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32, attn_implementation=attention)
    times = StepTimes()
    with tempfile.TemporaryDirectory() as folder:
        # From a folder of its own, so that TRL's cache of reference log-probs starts empty.
        Dataset.from_list([pairs[index] for index in order]).save_to_disk(f"{folder}/pairs")
        config = DPOConfig(
            output_dir=f"{folder}/out",
            precompute_ref_log_probs=method == "precompute",
            precompute_ref_batch_size=micro,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=options.batch_size // micro,
            max_steps=steps,
            max_length=None,
            beta=options.beta,
            learning_rate=options.learning_rate,
            lr_scheduler_type="constant",
            warmup_steps=0,
            weight_decay=0.0,
            max_grad_norm=1.0,
            optim="adamw_torch_fused" if torch.cuda.is_available() else "adamw_torch",
            bf16=options.dtype == "bfloat16",
            use_cpu=not torch.cuda.is_available(),
            gradient_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            **settings,
        )
        started = time.perf_counter()
        trainer = Timed(
            model=model,
            args=config,
            train_dataset=Dataset.load_from_disk(f"{folder}/pairs"),
            processing_class=tokenizer_of(model),
            callbacks=[times],
        )
        prepared = time.perf_counter() - started
        trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    return {
        "seconds": times.seconds,
        "loss": [row["loss"] for row in rows],
        "grad_norm": [row["grad_norm"] for row in rows],
        "micro_batch_size": micro,
        "preparation": prepared,
        "peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=["online", "precompute"])
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--micro-batch-sizes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--batch-order", choices=["examples", "prompts"], default="examples")
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    logging.disable_progress_bar()
    pairs = load_pairs(options.pairs)
    best = options.micro_batch_sizes[0]
    if len(options.micro_batch_sizes) > 1:
        # Of two steps the second: the first pays for warming up.
        tried = {
            micro: train(pairs, options, micro=micro, steps=2, method="online")["seconds"][1]
            for micro in options.micro_batch_sizes
        }
        best = min(tried, key=lambda micro: tried[micro])
    found = train(pairs, options, micro=best, steps=options.steps, method=options.method)
    options.out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
