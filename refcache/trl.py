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
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import trl
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

from cache import CacheIncomplete
from refcache.lookup import Paths
from refcache.sequences import rows_of
from refcache.stand_in import CachedReference
from refcache.trl_arguments import EVALUATED_TRAIN, by_name, datasets_of, refuse_dataset
from refcache.unscored import Unscored, scoring_advice, unscored_folder, write_unscored

if not all(hasattr(kind, "_precompute_ref_logps") for kind in (DPOTrainer, KTOTrainer)):
    raise ImportError(
        f"TRL {trl.__version__} has no _precompute_ref_logps in its DPOTrainer or KTOTrainer, which refcache.trl "
        "answers from a cache; it is written for TRL 1.16. Install that: pip install 'trl==1.16.*'"
    )


class _FromCache:
    """Before one of TRL's trainers: what that computes with `precompute_ref_log_probs`, from the cache."""

    _trl: type  # the trainer of TRL's whose arguments are meant
    _config: Any  # the class of its args
    _columns: tuple[str, ...]  # that TRL reads from a precomputed dataset
    # TRL's own.
    accelerator: Any
    args: Any
    data_collator: Any
    model: Any
    processing_class: Any
    ref_model: Any

    def __init__(self, *args: Any, reference_cache: Paths, **kwargs: Any) -> None:
        """reference_cache: a folder that `refcache score` published, or several of one reference. Everything else as
        TRL's own trainer takes it."""
        given = by_name(self._trl, args, kwargs)
        self._refuse(given)
        given["args"] = copy.copy(given["args"])
        given["args"].precompute_ref_log_probs = True
        self._reference = CachedReference(reference_cache)
        self._unscored: list[Unscored] = []
        self._rows_read, self._begun = 0, False
        self._given_rows = {name: len(dataset) for name, dataset in datasets_of(given)}
        self._kept = dict[str, str]()  # how many rows TRL made of them, for messages
        self._answered = set[str]()  # datasets' fingerprints
        super().__init__(**given)
        self._begun = True
        self._require_all_scored()
        self._compare_dtypes()

    def _refuse(self, given: dict[str, Any]) -> None:
        """ValueError for what a cache can't serve."""
        settings = given.get("args")
        if given.get("ref_model") is not None:
            raise ValueError("ref_model and reference_cache were given: the reference is one or the other.")
        if settings is None:
            raise ValueError(f"args is missing: the trainer's configuration, a {self._config.__name__}.")
        if not isinstance(settings, self._config):
            raise ValueError(f"args is a {type(settings).__name__}; a {self._config.__name__} is needed.")
        if settings.sync_ref_model:
            raise ValueError(
                "sync_ref_model moves the reference towards the policy while that trains, and a cache holds the "
                "reference as it was scored. Leave one of them out."
            )
        for name, dataset in datasets_of(given):
            refuse_dataset(name, dataset)

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """`dataset` with the columns that TRL would have computed.

        Raises CacheIncomplete where rows are missing; of the sets that a trainer is made with once, for all of them.
        """
        if name == "train" and self._answered:  # the training set came first, under this name
            name = EVALUATED_TRAIN
        self._refuse_prepared(name, dataset)
        given = self._given_rows.get(name, len(dataset))
        if len(dataset) != given:
            self._kept[name] = f" (counted from 0 in the {len(dataset)} rows that TRL made of {given})"
        self._reference.lookup.decode = self.processing_class.decode  # TRL loads one where none is given
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
        self._answered.add(dataset._fingerprint)
        return dataset

    def _refuse_prepared(self, name: str, dataset: Any) -> None:
        if isinstance(dataset, Dataset) and not len(dataset):
            raise ValueError(
                f"Nothing is left of the {name} set: TRL leaves out prompts of max_length tokens and more, and "
                f"max_length is {self.args.max_length}. Raise it, or leave the set out."
            )
        refuse_dataset(name, dataset)

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
            f"{rows[0].number} of the {rows[0].dataset} set{self._kept.get(rows[0].dataset, '')}: {rows[0].why}"
            f"{scoring_advice(folder) if scorable else ''}"
        )

    def _compare_dtypes(self) -> None:
        """Warn where the trainer's forward has another type than the reference had."""
        computed = "bfloat16" if self.args.bf16 else "float16" if self.args.fp16 else str(self.model.dtype)
        trains, scored = computed.removeprefix("torch."), self._reference.lookup.dtype
        if trains != scored:
            warnings.warn(
                f"The reference was scored in {scored} and the policy trains in {trains} (bf16, fp16 in args; without "
                "them the model's own). Rounding then counts as a difference between the two from the first step on. "
                "Score in the type that trains (score.dtype).",
                stacklevel=3,
            )

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        if isinstance(eval_dataset, dict):
            eval_dataset = {name: self._as_given(dataset) for name, dataset in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = self._as_given(eval_dataset)
        for name, dataset in datasets_of({"eval_dataset": eval_dataset}):
            if not isinstance(dataset, str):  # the name of a set that the trainer has
                refuse_dataset(name, dataset)
                self._given_rows[name] = len(dataset)
        # TRL refuses a new set after the first step, when its reference is gone; the cache is still there.
        self.ref_model = self._reference
        try:
            found: dict[str, float] = super().evaluate(eval_dataset, *args, **kwargs)  # type: ignore[misc]
            return found
        finally:
            self.ref_model = None

    def _as_given(self, dataset: Any) -> Any:
        """Without the columns that came from the cache, as of `trainer.eval_dataset`: TRL asks for them again."""
        if isinstance(dataset, Dataset) and dataset._fingerprint in self._answered:
            return dataset.remove_columns(list(self._columns))
        return dataset


class _Side(NamedTuple):
    """Sequences of a batch, each (rows, length)."""

    input_ids: Tensor
    attention_mask: Tensor
    completion_mask: Tensor


class _Logps(NamedTuple):
    """Of the tokens of each sequence but the first, (rows, length - 1): nats, and which are of the response."""

    logps: Tensor
    answers: Tensor


class DPOFromCache(_FromCache):
    """Put before a subclass of `trl.DPOTrainer`, makes it what CachedDPOTrainer is."""

    _trl, _config = DPOTrainer, DPOConfig
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

    _trl, _config = KTOTrainer, KTOConfig
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
