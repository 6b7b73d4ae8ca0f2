"""The reference's log-probs by other means, timed: TRL's precompute, and a plain length-sorted transformers forward.

    python benchmarks/score_peers.py trl|sorted --pairs DIR --model DIR --dtype float32 --batch-sizes 1 2 4 8 --out FILE

Each gets the same prepared token ids. The batch size that is fastest on a sample of the pairs is taken for the timed
pass. Writes JSON: seconds of the timed pass alone (model loading and tokenisation excluded), the batch size, and the
summed log-probs of chosen and rejected by pair.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from pipeline.data.tables import read_pairs, read_responses

Pair = dict[str, list[int]]  # prompt_ids, chosen_ids, rejected_ids
Sums = list[tuple[float, float]]
SAMPLE = 8  # pairs on which batch sizes are tried


def load_pairs(folder: Path) -> list[Pair]:
    responses = read_responses(folder)
    ids = dict(zip(responses["response_key"], responses.select("prompt_ids", "response_ids").rows(), strict=True))
    table = read_pairs(folder).select("chosen_key", "rejected_key")
    return [
        {"prompt_ids": ids[chosen][0], "chosen_ids": ids[chosen][1], "rejected_ids": ids[rejected][1]}
        for chosen, rejected in table.iter_rows()
    ]


def by_trl(model: torch.nn.Module, pairs: list[Pair], batch_size: int, dtype: str) -> tuple[float, Sums]:
    """DPOTrainer's own precompute and collator, which pads both responses of all pairs to one length."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    class Timed(DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *rest: Any, **options: Any) -> Any:
            return dataset  # tokenised already, with the ids that everybody gets

        def _precompute_ref_logps(self, *arguments: Any, **options: Any) -> Any:
            started = time.perf_counter()
            dataset = super()._precompute_ref_logps(*arguments, **options)
            self.precompute_seconds = time.perf_counter() - started
            return dataset

    with tempfile.TemporaryDirectory() as folder:
        # In a folder of its own, so that its row cache starts empty.
        Dataset.from_list(pairs).save_to_disk(f"{folder}/pairs")
        config = DPOConfig(
            output_dir=f"{folder}/out",
            precompute_ref_log_probs=True,
            precompute_ref_batch_size=batch_size,
            max_length=None,
            bf16=dtype == "bfloat16",
            use_cpu=not torch.cuda.is_available(),
            report_to=[],
            disable_tqdm=True,
            gradient_checkpointing=False,
        )
        dataset = Dataset.load_from_disk(f"{folder}/pairs")
        trainer = Timed(model=model, args=config, train_dataset=dataset, processing_class=tokenizer_of(model))
        found = trainer.train_dataset
        sums = list(zip(found["ref_chosen_logps"], found["ref_rejected_logps"], strict=True))
    return trainer.precompute_seconds, [(float(chosen), float(rejected)) for chosen, rejected in sums]


def tokenizer_of(model: torch.nn.Module) -> Any:
    from pipeline.model.tokenizer import open_tokenizer

    tokenizer = open_tokenizer(Path(model.name_or_path))
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def by_sorted_forward(model: torch.nn.Module, pairs: list[Pair], batch_size: int, dtype: str) -> tuple[float, Sums]:
    """What one would write by hand: both sequences of every pair, longest first, padded batches, all logits."""
    sequences = [(pair["prompt_ids"], pair[side]) for pair in pairs for side in ("chosen_ids", "rejected_ids")]
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i][0]) - len(sequences[i][1]))
    sums = [0.0] * len(sequences)
    started = time.perf_counter()
    with torch.inference_mode():
        for start in range(0, len(order), batch_size):
            batch = [sequences[i] for i in order[start : start + batch_size]]
            longest = max(len(prompt) + len(response) for prompt, response in batch)
            ids = torch.zeros(len(batch), longest, dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for row, (prompt, response) in enumerate(batch):
                ids[row, : len(prompt) + len(response)] = torch.tensor(prompt + response)
                mask[row, : len(prompt) + len(response)] = 1
            ids, mask = ids.to(model.device), mask.to(model.device)
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            logps = logits[:, :-1].float().log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
            for row, (prompt, response) in enumerate(batch):
                of_response = logps[row, len(prompt) - 1 : len(prompt) + len(response) - 1]
                sums[order[start + row]] = float(of_response.double().sum())
    seconds = time.perf_counter() - started
    return seconds, list(zip(sums[::2], sums[1::2], strict=True))


METHODS: dict[str, Callable[..., tuple[float, Sums]]] = {"trl": by_trl, "sorted": by_sorted_forward}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], required=True)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    logging.disable_progress_bar()
    pairs = load_pairs(options.pairs)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype)).eval()
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    method = METHODS[options.method]
    sample = pairs[:: max(1, len(pairs) // SAMPLE)][:SAMPLE]
    best = options.batch_sizes[0]
    if len(options.batch_sizes) > 1:
        method(model, sample[:2], 1, options.dtype)  # the first forward pays for the others
        times = {size: method(model, sample, size, options.dtype)[0] for size in options.batch_sizes}
        best = min(times, key=lambda size: times[size])
    seconds, sums = method(model, pairs, best, options.dtype)
    options.out.write_text(json.dumps({"seconds": seconds, "batch_size": best, "sums": sums}))


if __name__ == "__main__":
    main()
