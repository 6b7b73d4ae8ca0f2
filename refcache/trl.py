"""TRL's preference trainers on a reference cache: no reference model in memory, none of its forwards.

    from refcache.trl import CachedDPOTrainer

    trainer = CachedDPOTrainer(model, args=..., train_dataset=..., reference_cache="data/reference/logps")

Values are looked up by the tokens of TRL's own batches, after its template, its tokenisation and its truncation, so a
cached value can't belong to other tokens; what the cache does not hold is an error before the first step. For trainers
made by others on top of TRL's (or TRL's own), `CachedReference` stands in for `ref_model`.

Read from and tested with TRL 1.16. Values come from the engine that scored: drift.json beside them says how far the
trainer's own forward is from them, in which dtype.
"""

import copy
import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PretrainedConfig
from trl import DPOTrainer, KTOTrainer

from cache import CacheIncomplete
from refcache.lookup import ReferenceLookup

IGNORED = -100  # label of a token that is no response token


class CachedReference(nn.Module):
    """Stands in for the reference model of `DPOTrainer` or `KTOTrainer` (`ref_model=`): answers from a reference cache.

    It has no weights and computes nothing, so `sync_ref_model`, DeepSpeed's and FSDP's wrapping of a reference model
    have nothing to work on: use `CachedDPOTrainer` and `CachedKTOTrainer` there. Raises CacheIncomplete in the first
    batch that has a sequence the cache lacks.
    """

    def __init__(self, reference_cache: Path | str, tokenizer: Any = None) -> None:
        """tokenizer: for texts in error messages."""
        super().__init__()
        self.config = PretrainedConfig()  # TRL looks there for a scale of logits
        self.lookup = ReferenceLookup(reference_cache, decode=tokenizer and tokenizer.decode)

    def __setattr__(self, name: str, value: Any) -> None:
        # TRL and accelerate replace a model's `forward` by one that runs its layers.
        if name != "forward":
            super().__setattr__(name, value)

    @torch.no_grad()
    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, labels: Tensor, **ignored: Any
    ) -> SimpleNamespace:
        """`.log_probs`, (rows, length - 1) float32 nats: of token i + 1 at i, 0 where its label is -100."""
        present = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        logps = torch.zeros(len(labels), labels.shape[1] - 1)
        for row, sequence in enumerate(zip(input_ids.cpu(), present.cpu().bool(), labels.cpu(), strict=True)):
            try:
                self._fill(logps[row], *sequence)
            except CacheIncomplete as error:
                raise MissingRow(row, str(error)) from None
        return SimpleNamespace(log_probs=logps.to(input_ids.device))

    def _fill(self, logps: Tensor, input_ids: Tensor, present: Tensor, labels: Tensor) -> None:
        answers = labels != IGNORED
        if not answers.any():  # all of the response was cut off
            return
        first = int(answers[present].int().argmax())
        if not answers[present][first:].all():
            raise CacheIncomplete("The response is not the end of its sequence, so there is no single row for it.")
        tokens = input_ids[present].numpy()
        found = self.lookup.token_logps(tokens[:first], tokens[first:])
        logps[answers[1:]] = torch.from_numpy(found.copy())


class MissingRow(CacheIncomplete):
    """A sequence of a batch that the cache lacks. row: its number in the batch."""

    def __init__(self, row: int, message: str) -> None:
        super().__init__(message)
        self.row = row


class _FromCache:
    """What TRL precomputes with `precompute_ref_log_probs`, from the cache; before one of its trainers."""

    _columns: tuple[str, ...]  # that TRL reads from a precomputed dataset
    _parts: tuple[str, ...]  # what the parts of a batch are called, each as long as the batch
    # TRL's own.
    accelerator: Any
    compute_ref_log_probs: Any
    data_collator: Any
    ref_model: Any

    def __init__(self, *args: Any, reference_cache: Path | str, **kwargs: Any) -> None:
        """reference_cache: folder that `refcache score` published. Everything else as TRL's own trainer takes it."""
        bound = inspect.signature(super().__init__).bind_partial(*args, **kwargs)
        given = dict(bound.arguments)
        if given.get("ref_model") is not None:
            raise ValueError("ref_model and reference_cache were given: the reference is one or the other.")
        settings = given.get("args")
        if settings is None:
            raise ValueError("args is missing: the trainer's configuration, a DPOConfig or KTOConfig.")
        given["args"] = copy.copy(settings)
        given["args"].precompute_ref_log_probs = True
        tokenizer = given.get("processing_class")
        self._reference = CachedReference(reference_cache, tokenizer)
        super().__init__(**given)

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """`dataset` with the columns that TRL would have computed. Raises CacheIncomplete naming the first missing."""
        if not isinstance(dataset, Dataset):
            raise ValueError(f"The {name} set is a {type(dataset).__name__}; a datasets.Dataset (no stream) is needed.")
        logps: list[list[float]] = [[] for _ in self._columns]
        batches = DataLoader(dataset, batch_size, collate_fn=self.data_collator, shuffle=False)
        for number, batch in enumerate(batches):
            try:
                values = self._of_batch(batch)
            except MissingRow as error:
                rows = min(batch_size, len(dataset) - number * batch_size)
                part, row = divmod(error.row, rows)
                raise CacheIncomplete(
                    f"Row {number * batch_size + row} of the {name} set, {self._parts[part]}: {error}"
                ) from None
            for column, each in zip(logps, values, strict=True):
                column += each.tolist()
        for name_of_column, column in zip(self._columns, logps, strict=True):
            dataset = dataset.add_column(name_of_column, column, feature=None)
        return dataset

    def _of_batch(self, batch: dict[str, Any]) -> tuple[Tensor, ...]:
        device = self.accelerator.device
        moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
        found: tuple[Tensor, ...] = self.compute_ref_log_probs(self._reference, moved)
        return found

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        # TRL refuses a new set after the first step, when its reference is gone; the cache is still there.
        self.ref_model = self._reference
        try:
            found: dict[str, float] = super().evaluate(eval_dataset, *args, **kwargs)  # type: ignore[misc]
            return found
        finally:
            self.ref_model = None


class CachedDPOTrainer(_FromCache, DPOTrainer):  # type: ignore[misc]
    """`trl.DPOTrainer` whose reference log-probs come from the reference cache in the folder `reference_cache`.

    Every loss, `ld_alpha`, LoRA, evaluation sets and several processes as in TRL, with `precompute_ref_log_probs` set.
    Each process looks up every row itself before the first step. Raises CacheIncomplete naming the row that is missing.
    """

    _columns = ("ref_chosen_logps", "ref_rejected_logps")
    _parts = ("its chosen response", "its rejected response")


class CachedKTOTrainer(_FromCache, KTOTrainer):  # type: ignore[misc]
    """`trl.KTOTrainer` whose reference log-probs come from a reference cache; as CachedDPOTrainer.

    KTO's baseline asks for each completion under the prompt of the next row of its batch as well (not with loss_type
    "apo_zero_unpaired"): these mismatched pairs depend on the order and the batch size and have to be scored, too.
    """

    _parts = ("its completion", "its mismatched completion, which KTO's baseline is made of")

    @property
    def _columns(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("ref_logps", "ref_KL_logps") if self.calculate_KL else ("ref_logps",)

    def _of_batch(self, batch: dict[str, Any]) -> tuple[Tensor, ...]:
        try:
            return super()._of_batch(batch)[: len(self._columns)]
        except MissingRow as error:
            if self._has_completions(batch):
                error.row += len(batch["label"])
            raise

    def _has_completions(self, batch: dict[str, Any]) -> bool:
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, IGNORED)
        try:
            self._reference(batch["input_ids"], batch["attention_mask"], labels=labels)
        except MissingRow:
            return False
        return True
