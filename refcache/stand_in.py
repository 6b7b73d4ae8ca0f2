"""A module in the place of a reference model: it answers from a reference cache."""

import os
from types import SimpleNamespace
from typing import Any

import torch
import trl
from torch import Tensor, nn
from transformers import PretrainedConfig

from cache import CacheIncomplete
from refcache.lookup import Paths, ReferenceLookup
from refcache.sequences import Row, rows_of

IGNORED = -100  # label of a token that is no response token


class CachedReference(nn.Module):
    """Stands in for the reference model of `DPOTrainer` or `KTOTrainer` (`ref_model=`): answers from a reference cache.

    It has no weights and computes nothing, so DeepSpeed's and FSDP's wrapping of a reference model have nothing to work
    on: use `CachedDPOTrainer` and `CachedKTOTrainer` there. Nor can it move with the policy (`sync_ref_model`). Raises
    CacheIncomplete in the first batch that has a sequence the cache lacks.
    """

    def __init__(self, reference_cache: Paths, tokenizer: Any = None) -> None:
        """reference_cache: a folder that `refcache score` published, or several of one reference. tokenizer: for texts
        in error messages."""
        super().__init__()
        self.config = PretrainedConfig()  # TRL looks there for a scale of logits
        self.lookup = ReferenceLookup(reference_cache, decode=tokenizer and tokenizer.decode)
        # TRL names what it precomputes by a hash of the dataset and of the reference's tensors, and loads what has that
        # name. Neither knows of ld_alpha, nor of max_length with keep_end, so nothing may be loaded that came before.
        self.register_buffer("never_again", torch.tensor(list(os.urandom(16)), dtype=torch.uint8))

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
            raise CacheIncomplete(
                "Nothing is left of its prompt, so no token of the response can be scored behind it. It was cut off "
                "(truncation_mode keep_end), or it is empty, or the tokenizer makes nothing of it: compare with "
                "processing_class(prompt)."
            )
        return torch.from_numpy(self.lookup.token_logps(row.prompt_ids, row.response_ids).copy())
