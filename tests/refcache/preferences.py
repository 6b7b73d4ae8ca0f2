"""A tiny model, preferences and their reference cache, and TRL's trainers on them."""

from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig

from cache import logps_table, prompt_key, publish_reference, response_key
from pipeline.reference.identity import reference_identity
from tests.tiny import EOS, draw_sequence, plain_logps, write_model

Sequences = list[tuple[list[int], list[int]]]


def words(ids):
    return " ".join("</s>" if i == EOS else f"w{i}" for i in ids)


def draw_preferences(rows, seed):
    draw = np.random.default_rng(seed)
    return [
        (draw_sequence(draw, 2, 9), [*draw_sequence(draw, 2, 15), EOS], [*draw_sequence(draw, 2, 15), EOS])
        for _ in range(rows)
    ]


def publish(out: Path, model: Path, sequences: Sequences) -> Path:
    rows = {response_key(*row): row for row in sequences}
    prompts, responses = zip(*rows.values(), strict=True)
    table = logps_table(
        response_keys=list(rows),
        prompt_keys=[prompt_key(prompt) for prompt in prompts],
        n_prompt_tokens=[len(prompt) for prompt in prompts],
        token_ids=list(responses),
        token_logps=[plain_logps(model, *row) for row in rows.values()],
    )
    publish_reference(out, table, reference_identity(model, dtype="float32", quantization=None))
    return out


class Place:
    """A model, preferences to train and evaluate on, and the reference cache of all of them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.model = folder, write_model(folder / "model")
        train, test = draw_preferences(24, 0), draw_preferences(6, 1)
        self.pairs, self.test = self.dataset(train), self.dataset(test)
        self.rows = [(p, r) for p, *responses in train + test for r in responses]
        self.cache = publish(folder / "logps", self.model, self.rows)

    @staticmethod
    def dataset(preferences) -> Dataset:
        texts = [(words(p), " " + words(c), " " + words(r)) for p, c, r in preferences]
        return Dataset.from_list([dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in texts])

    def feedback(self) -> Dataset:
        rows = [
            {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
            for row in self.pairs
            for side in ("chosen", "rejected")
        ]
        return Dataset.from_list(rows).shuffle(seed=5)

    def trainer(self, kind, *, config=DPOConfig, settings=(), train_dataset=None, **options):
        args = config(
            **{
                "output_dir": str(self.folder / "out"),
                "per_device_train_batch_size": 4,
                "per_device_eval_batch_size": 4,
                "max_steps": 10,
                "learning_rate": 1e-3,
                "lr_scheduler_type": "constant",
                "logging_steps": 1,
                "save_strategy": "no",
                "report_to": "none",
                "disable_tqdm": True,
                "bf16": False,
                "use_cpu": True,
                "gradient_checkpointing": False,
                "seed": 3,
                **dict(settings),
            }
        )
        options.setdefault("model", AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32))
        tokenizer = PreTrainedTokenizerFast.from_pretrained(self.model)
        data = train_dataset or self.pairs
        torch.manual_seed(0)
        return kind(args=args, train_dataset=data, processing_class=tokenizer, **options)


def losses_of(trainer, **options):
    """Of every step of a training."""
    trainer.train(**options)
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]
