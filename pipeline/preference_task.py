"""The ranks' side of preference training: pairs with their cached reference values, the policy, the objective."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from cache import join_sum_logps, locate, open_reference
from pipeline.deepspeed_engine import Engine
from pipeline.launch import Job
from pipeline.layout import choose_layout
from pipeline.logps import ResponseLogps, TokenBatch, collate, pack, sequence_sums
from pipeline.models import disable_dropout, load_policy_start
from pipeline.objectives import OBJECTIVES, PairLogps
from pipeline.params import LoopParams, Trainable
from pipeline.prepared_data import PAIR_SIDES, scan_pairs, scan_responses
from pipeline.start_check import StartCheck
from pipeline.trainable import select_trainable
from pipeline.training import micro_steps_for
from pipeline.workspace import scratch_folder


class PreferenceTask:
    """Mean of an objective over the pairs of the batch; the reference is two float64 columns."""

    def __init__(
        self,
        pairs: Path,
        reference: Path,
        *,
        objective: str,
        hyperparameters: dict[str, Any],
        reward_beta: float,
        drift_tolerance: float,
        layout: str,
    ) -> None:
        """layout: "padded", "packed" or "shared_prompts". reward_beta: inverse temperature of the reward metrics.

        drift_tolerance: nats a response by which the policy may differ from the cached reference at the start.
        """
        self.objective, self.hyperparameters = OBJECTIVES[objective], hyperparameters
        self.beta = reward_beta
        table = scan_pairs(pairs).filter(pl.col("split") == "train").select(PAIR_SIDES).collect()
        self.start = StartCheck(reference, pairs, drift_tolerance)
        columns = ("response_key", "prompt_key", "prompt_ids", "response_ids")
        responses = scan_responses(pairs).select(columns).collect()
        self.prompts = responses["prompt_ids"]
        self.responses = responses["response_ids"]
        self.response_lengths = responses["response_ids"].list.len().to_numpy().astype(np.int64)
        # (n_pairs, 2): chosen and rejected, as rows of `responses`.
        self.sides = np.stack([locate(table[side], responses["response_key"]) for side in PAIR_SIDES], axis=1)
        assert (self.sides >= 0).all()  # prepare writes every response of a pair
        self.reference_logps = join_sum_logps(
            open_reference(reference, expect=None), table.to_arrow().to_batches(), scratch=scratch_folder()
        )
        self.prompt_lengths = responses["prompt_ids"].list.len().to_numpy().astype(np.int64)
        # Of every response, a number that responses under the same prompt have in common.
        self.prompt_numbers = responses["prompt_key"].rank("dense").to_numpy().astype(np.int64)
        self.lengths = (self.response_lengths + self.prompt_lengths)[self.sides].sum(axis=1)
        self.layout = layout
        self.groups = self.prompt_numbers[self.sides[:, 0]]

    def tokens(self, examples: np.ndarray) -> int:
        rows, _ = self._rows(examples)
        lengths, prompts = self.response_lengths[rows], self.prompt_lengths[rows]
        if self.layout == "padded":
            return int((lengths + prompts).max() * len(rows))
        if self.layout == "shared_prompts":
            prompts = prompts[np.unique(self.prompt_numbers[rows], return_index=True)[1]]
        return int(lengths.sum() + prompts.sum())

    def _rows(self, examples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows of `responses` to forward, and of every chosen, then every rejected response its place among them."""
        sides = self.sides[examples].T.ravel()
        if self.layout == "padded":  # the plain way: as often as it is in a pair
            return sides, np.arange(len(sides))
        rows, places = np.unique(sides, return_inverse=True)
        return rows, places

    def _batch(self, rows: np.ndarray) -> TokenBatch:
        sequences = [(self.prompts[int(row)], self.responses[int(row)]) for row in rows]
        if self.layout == "padded":
            return collate(sequences)
        return pack(sequences, self.prompt_numbers[rows] if self.layout == "shared_prompts" else np.arange(len(rows)))

    def loss(self, engine: Engine, micro: np.ndarray, batch: np.ndarray) -> tuple[Tensor, dict[str, Tensor]]:
        rows, places = self._rows(micro)
        tokens = self._batch(rows).to(engine.device)
        sums = sequence_sums(engine(*tokens), tokens.rows, len(rows))
        pair = self._pair_logps(sums.index_select(0, torch.from_numpy(places).to(sums.device)), micro)
        losses = self.objective(pair, **self.hyperparameters)
        sums = self._sums(pair, losses.detach())
        if engine.updates == 0:
            sums |= self.start.observe(pair, micro)
        return losses.sum() / len(batch), sums

    def _pair_logps(self, policy: Tensor, micro: np.ndarray) -> PairLogps:
        chosen, rejected = policy.chunk(2)
        reference = torch.tensor(self.reference_logps[micro].T, dtype=torch.float32, device=policy.device)
        lengths = torch.tensor(self.response_lengths[self.sides[micro]].T, device=policy.device)
        return PairLogps(chosen, rejected, reference[0], reference[1], lengths[0], lengths[1])

    def _sums(self, pair: PairLogps, losses: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            chosen = self.beta * pair.chosen_log_ratio
            rejected = self.beta * pair.rejected_log_ratio
            return {
                "loss": losses.sum(),
                "rewards/chosen": chosen.sum(),
                "rewards/rejected": rejected.sum(),
                "rewards/margins": (chosen - rejected).sum(),
                "rewards/accuracies": (chosen > rejected).sum(),
                "logps/chosen": pair.chosen.sum(),
                "logps/rejected": pair.rejected.sum(),
                "dcr": (chosen < 0).sum(),
                "nll/chosen": -pair.chosen.sum(),
                "in_distribution_logp": torch.logaddexp(pair.chosen, pair.rejected).sum(),
            }

    def summarise(self, sums: dict[str, float], batch: np.ndarray) -> dict[str, float]:
        self.start.judge(sums, len(batch))
        row = {name: value / len(batch) for name, value in sums.items()}
        # Nats per token, as language-model losses are given; everything else is a mean over pairs.
        row["nll/chosen"] = sums["nll/chosen"] / float(self.response_lengths[self.sides[batch, 0]].sum())
        return row


def start(job: Job, loop: LoopParams) -> tuple[Engine, PreferenceTask, nn.Module]:
    """Engine, task and policy of one rank; no reference model is loaded."""
    trainable = TypeAdapter(Trainable).validate_python(job.settings["trainable"])
    model = select_trainable(load_policy_start(Path(job.paths["model"])), trainable)
    if loop.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    layout = choose_layout(disable_dropout(model), loop.layout, best="shared_prompts")
    model.train()
    task = PreferenceTask(
        Path(job.paths["pairs"]),
        Path(job.paths["reference"]),
        objective=job.settings["objective"],
        hyperparameters=job.settings["hyperparameters"],
        reward_beta=job.settings["reward_beta"],
        drift_tolerance=job.settings["drift_tolerance"],
        layout=layout,
    )
    engine = Engine(ResponseLogps(model, loop.logps_chunk_tokens), loop, micro_steps=micro_steps_for(loop))
    return engine, task, model
