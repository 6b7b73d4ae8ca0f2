"""TRL's preference trainers on a reference cache: no reference model in memory, none of its forwards.

    from refcache.trl import CachedDPOTrainer

    trainer = CachedDPOTrainer(model, args=..., train_dataset=..., reference_cache="data/reference/logps")

Values are looked up by the tokens of TRL's own batches, after its template, its tokenisation and its truncation, so a
cached value can't belong to other tokens; what the cache does not hold is an error before the first step, and is
written down for `refcache score`. docs/trl.md has more.

Read from and tested with TRL 1.16. Values come from the engine that scored: drift.json beside them says how far the
trainer's own forward is from them, in which dtype.
"""

import copy
import inspect
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
import trl
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PretrainedConfig
from trl import DPOTrainer, KTOTrainer

from cache import CacheIncomplete
from refcache.lookup import Paths, ReferenceLookup
from refcache.sequences import Row, rows_of
from refcache.unscored import Unscored, scoring_advice, unscored_folder, write_unscored

IGNORED = -100  # label of a token that is no response token
PRECOMPUTED = {"ref_chosen_logps", "ref_rejected_logps", "ref_logps", "ref_KL_logps"}  # TRL's columns

if not all(hasattr(kind, "_precompute_ref_logps") for kind in (DPOTrainer, KTOTrainer)):
    raise ImportError(
        f"TRL {trl.__version__} has no _precompute_ref_logps in its DPOTrainer or KTOTrainer, which refcache.trl "
        "answers from a cache; it is written for TRL 1.16. Install that: pip install 'trl==1.16.*'"
    )


class CachedReference(nn.Module):
    """Stands in for the reference model of `DPOTrainer` or `KTOTrainer` (`ref_model=`): answers from a reference cache.

    It has no weights and computes nothing, so `sync_ref_model`, DeepSpeed's and FSDP's wrapping of a reference model
    have nothing to work on: use `CachedDPOTrainer` and `CachedKTOTrainer` there. Raises CacheIncomplete in the first
    batch that has a sequence the cache lacks.
    """

    def __init__(self, reference_cache: Paths, tokenizer: Any = None) -> None:
        """reference_cache: a folder that `refcache score` published, or several of one reference. tokenizer: for texts
        in error messages."""
        super().__init__()
        self.config = PretrainedConfig()  # TRL looks there for a scale of logits
        self.lookup = ReferenceLookup(reference_cache, decode=tokenizer and tokenizer.decode)
        # TRL names what it precomputes by a hash of the reference's tensors, and loads what has that name.
        identity = torch.tensor(list(bytes.fromhex(self.lookup.reference_id)), dtype=torch.uint8)
        self.register_buffer("identity", identity)

    def __setattr__(self, name: str, value: Any) -> None:
        # TRL and accelerate replace a model's `forward` by one that runs its layers.
        if name != "forward":
            super().__setattr__(name, value)

    @torch.no_grad()
    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **ignored: Any
    ) -> SimpleNamespace:
        """`.log_probs`, (rows, length - 1) float32 nats: of token i + 1 at i, 0 where its label is -100."""
        if labels is None:
            raise ValueError(
                f"This trainer asks its reference for logits, as TRL did before 1.16 (this is {trl.__version__}); a "
                "cache holds the log-probs of the responses alone. Use CachedDPOTrainer or CachedKTOTrainer, or put "
                "DPOFromCache or KTOFromCache before the trainer."
            )
        present = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        logps = torch.zeros(len(labels), labels.shape[1] - 1)
        for number, row in enumerate(rows_of(input_ids, present, labels != IGNORED)):
            if row is not None:
                logps[number, row.places] = self.logps_of(row)
        return SimpleNamespace(log_probs=logps.to(input_ids.device))

    def logps_of(self, row: Row) -> Tensor:
        """Of the tokens of its response, nats, (response length,) float32. Raises CacheIncomplete."""
        if not len(row.prompt_ids):
            raise CacheIncomplete("Nothing is left of its prompt, so no token of the response can be scored behind it.")
        return torch.from_numpy(self.lookup.token_logps(row.prompt_ids, row.response_ids).copy())


class _FromCache:
    """Before one of TRL's trainers: what that computes with `precompute_ref_log_probs`, from the cache."""

    _trl: type  # the trainer of TRL's whose arguments are meant
    _columns: tuple[str, ...]  # that TRL reads from a precomputed dataset
    # TRL's own.
    accelerator: Any
    args: Any
    data_collator: Any
    ref_model: Any

    def __init__(self, *args: Any, reference_cache: Paths, **kwargs: Any) -> None:
        """reference_cache: a folder that `refcache score` published, or several of one reference. Everything else as
        TRL's own trainer takes it."""
        positional = list(inspect.signature(self._trl.__init__).parameters)[1:]  # type: ignore[misc]
        given = dict(zip(positional, args, strict=False)) | kwargs
        self._refuse(given)
        given["args"] = copy.copy(given["args"])
        given["args"].precompute_ref_log_probs = True
        self._reference = CachedReference(reference_cache, given.get("processing_class"))
        self._unscored: list[Unscored] = []
        self._rows_read, self._begun = 0, False
        super().__init__(**given)
        self._begun = True
        self._require_all_scored()

    def _refuse(self, given: dict[str, Any]) -> None:
        """ValueError for what a cache can't serve."""
        settings = given.get("args")
        if given.get("ref_model") is not None:
            raise ValueError("ref_model and reference_cache were given: the reference is one or the other.")
        if settings is None:
            raise ValueError("args is missing: the trainer's configuration, a DPOConfig or KTOConfig.")
        if settings.sync_ref_model:
            raise ValueError(
                "sync_ref_model moves the reference towards the policy while that trains, and a cache holds the "
                "reference as it was scored. Leave one of them out."
            )
        for name, dataset in _datasets(given):
            self._refuse_dataset(name, dataset)

    def _refuse_dataset(self, name: str, dataset: Any) -> None:
        if not isinstance(dataset, Dataset):
            raise ValueError(
                f"The {name} set is a {type(dataset).__name__}; a datasets.Dataset is needed, whose rows are looked up "
                "before the first step. For streams give TRL's own trainer ref_model=CachedReference(...)."
            )
        if {"image", "images"} & set(dataset.column_names):
            raise ValueError(f"The {name} set has images; a reference cache holds log-probs of text alone.")
        if own := sorted(PRECOMPUTED & set(dataset.column_names)):
            raise ValueError(
                f"The {name} set brings {', '.join(own)}, and reference_cache was given: the values are of one or of "
                "the other. Remove these columns."
            )

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """`dataset` with the columns that TRL would have computed.

        Raises CacheIncomplete where rows are missing; of the sets that a trainer is made with once, for all of them.
        """
        self._refuse_dataset(name, dataset)
        logps = np.empty((len(self._columns), len(dataset)), np.float32)
        batches = DataLoader(dataset, batch_size, collate_fn=self.data_collator, shuffle=False)
        for number, batch in enumerate(batches):
            first = number * batch_size
            found = self._sums([self._tokens(side, name, first, what) for side, what in self._sides(batch)])
            logps[:, first : first + found.shape[1]] = found.numpy()
        self._rows_read += logps.size
        if self._begun:
            self._require_all_scored()
        for column, values in zip(self._columns, logps, strict=True):
            dataset = dataset.add_column(column, values, feature=None)
        return dataset

    def _sides(self, batch: dict[str, Tensor]) -> Iterator[tuple["_Side", str]]:
        """The sequences of a batch that each of `_columns` is of, in their order, and what they are called."""
        raise NotImplementedError

    def _sums(self, sides: list["_Logps"]) -> Tensor:
        """Of the log-probs of the responses, (sides, rows) nats."""
        return torch.stack([side.logps.sum(1) for side in sides])

    def _tokens(self, side: "_Side", name: str, first: int, what: str) -> "_Logps":
        """Token log-probs of sequences; a row that is missing is noted, and NaN."""
        answers = side.completion_mask[:, 1:].cpu().bool()
        logps = torch.zeros(answers.shape)
        for number, row in enumerate(rows_of(*side)):
            if row is not None:
                try:
                    logps[number, row.places] = self._reference.logps_of(row)
                except CacheIncomplete as error:
                    logps[number] = torch.nan
                    asked = (name, first + number, what, str(error))
                    self._unscored.append(Unscored(row.prompt_ids, row.response_ids, *asked))
        return _Logps(logps, answers)

    def _require_all_scored(self) -> None:
        """Raise CacheIncomplete that says what is missing, why, and what scores it."""
        rows, self._unscored = self._unscored, []
        read, self._rows_read = self._rows_read, 0
        if not rows:
            return
        scorable = [row for row in rows if len(row.prompt_ids)]
        folder = unscored_folder(Path(self.args.output_dir), scorable)
        if self.accelerator.is_main_process and scorable:
            write_unscored(folder, scorable, self._reference.lookup.decode)
        self.accelerator.wait_for_everyone()
        kinds = Counter((row.dataset, row.what) for row in rows)
        counted = ", ".join(f"{count} as {what} in the {name} set" for (name, what), count in kinds.items())
        raise CacheIncomplete(
            f"{len(rows)} of {read} responses are missing: {counted}. The first, {rows[0].what} of row "
            f"{rows[0].number} of the {rows[0].dataset} set: {rows[0].why}"
            f"{scoring_advice(folder) if scorable else ''}"
        )

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        # TRL refuses a new set after the first step, when its reference is gone; the cache is still there.
        self.ref_model = self._reference
        try:
            found: dict[str, float] = super().evaluate(eval_dataset, *args, **kwargs)  # type: ignore[misc]
            return found
        finally:
            self.ref_model = None


class _Side(NamedTuple):
    """Sequences of a batch, each (rows, length)."""

    input_ids: Tensor
    attention_mask: Tensor
    completion_mask: Tensor


class _Logps(NamedTuple):
    """Of the tokens of each sequence but the first, (rows, length - 1): nats, and which are of the response."""

    logps: Tensor
    answers: Tensor


def _datasets(given: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The datasets among a trainer's arguments, with their names."""
    for name in ("train", "eval"):
        dataset = given.get(f"{name}_dataset")
        if isinstance(dataset, dict):
            yield from dataset.items()
        elif dataset is not None:
            yield name, dataset


class DPOFromCache(_FromCache):
    """Put before a subclass of `trl.DPOTrainer`, makes it what CachedDPOTrainer is."""

    _trl = DPOTrainer
    _columns = ("ref_chosen_logps", "ref_rejected_logps")
    ld_alpha: float | None

    def _sides(self, batch: dict[str, Tensor]) -> Iterator[tuple[_Side, str]]:
        chosen, rejected = zip(*(batch[field].chunk(2) for field in _Side._fields), strict=True)
        yield _Side(*chosen), "chosen response"
        yield _Side(*rejected), "rejected response"

    def _sums(self, sides: list[_Logps]) -> Tensor:
        """With ld_alpha, tokens beyond the shorter response of a pair weigh that much."""
        if self.ld_alpha is None:
            return super()._sums(sides)
        shared = torch.minimum(*(side.answers.sum(1, keepdim=True) for side in sides))
        beyond = [side.answers.cumsum(1) > shared for side in sides]
        weights = [torch.where(late, self.ld_alpha, 1.0) for late in beyond]
        return torch.stack([(side.logps * weight).sum(1) for side, weight in zip(sides, weights, strict=True)])


class CachedDPOTrainer(DPOFromCache, DPOTrainer):  # type: ignore[misc]
    """`trl.DPOTrainer` whose reference log-probs come from a reference cache, in the folder(s) `reference_cache`.

    Every loss, `ld_alpha`, LoRA, evaluation sets and several processes as in TRL, with `precompute_ref_log_probs` set.
    Each process looks up every row itself before the first step. Raises CacheIncomplete where rows are missing: it
    names the first and the likely reason, and writes all of them to a folder in args.output_dir, for `refcache score`.
    """


class KTOFromCache(_FromCache):
    """Put before a subclass of `trl.KTOTrainer`, makes it what CachedKTOTrainer is."""

    _trl = KTOTrainer
    calculate_KL: bool  # TRL's name

    @property
    def _columns(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("ref_logps", "ref_KL_logps") if self.calculate_KL else ("ref_logps",)

    def _sides(self, batch: dict[str, Tensor]) -> Iterator[tuple[_Side, str]]:
        yield _Side(*(batch[field] for field in _Side._fields)), "completion"
        if self.calculate_KL:
            yield _Side(*(batch[f"KL_{field}"] for field in _Side._fields)), "mismatched completion of KTO's baseline"


class CachedKTOTrainer(KTOFromCache, KTOTrainer):  # type: ignore[misc]
    """`trl.KTOTrainer` whose reference log-probs come from a reference cache; as CachedDPOTrainer.

    KTO's baseline asks for each completion under the prompt of the next row of its batch as well (not with loss_type
    "apo_zero_unpaired"). These mismatched pairs depend on the order and the batch size, so no cache has them at first:
    the first run writes them, `refcache score` scores them, and the second run trains.
    """
