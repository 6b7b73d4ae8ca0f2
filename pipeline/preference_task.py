"""The ranks' side of preference training: pairs with their cached reference values, the policy, the objective."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from cache import join_sum_logps, locate, open_reference
from pipeline.deepspeed_engine import Engine, divided_from_the_start
from pipeline.held_out import HeldOutPairs
from pipeline.launch import Job
from pipeline.logps import ResponseLogps, collate, sequence_sums
from pipeline.models import disable_dropout, load_policy_start
from pipeline.objectives import OBJECTIVES, PairLogps
from pipeline.params import LoopParams, Trainable
from pipeline.prepared_data import PAIR_SIDES, name_pairs, scan_pairs, scan_responses
from pipeline.splitting import held_out_rows
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
        split: str = "train",
        most: int | None = None,
    ) -> None:
        """split: "train" or "test"; most: take no more than so many pairs of it.

        reward_beta: inverse temperature of the reward metrics.

        drift_tolerance: nats a response by which the policy may differ from the cached reference at the start.
        """
        self.objective, self.hyperparameters = OBJECTIVES[objective], hyperparameters
        self.beta = reward_beta
        table = scan_pairs(pairs).filter(pl.col("split") == split).select(PAIR_SIDES).collect()
        if most is not None:
            table = table[held_out_rows(len(table), most)]
        self.start = StartCheck(reference, pairs, drift_tolerance)
        of_split = scan_responses(pairs).filter(pl.col("split") == split)
        responses = of_split.select("response_key", "prompt_ids", "response_ids").collect()
        self.prompts = responses["prompt_ids"]
        self.responses = responses["response_ids"]
        self.response_lengths = responses["response_ids"].list.len().to_numpy().astype(np.int64)
        # (n_pairs, 2): chosen and rejected, as rows of `responses`.
        self.sides = np.stack([locate(table[side], responses["response_key"]) for side in PAIR_SIDES], axis=1)
        assert (self.sides >= 0).all()  # prepare writes every response of a pair
        self.reference_logps = join_sum_logps(
            open_reference(reference, expect=None), table.to_arrow().to_batches(), scratch=scratch_folder()
        )
        total = self.response_lengths + responses["prompt_ids"].list.len().to_numpy()
        self.lengths = total[self.sides].sum(axis=1)

    def loss(self, engine: Engine, micro: np.ndarray, batch: np.ndarray) -> tuple[Tensor, dict[str, Tensor]]:
        rows = self.sides[micro].T.ravel()  # all chosen, then all rejected
        tokens = collate([(self.prompts[int(row)], self.responses[int(row)]) for row in rows]).to(engine.device)
        sums = sequence_sums(engine(*tokens), tokens.rows, len(rows))
        pair = self._pair_logps(sums, micro)
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

    def names(self, examples: np.ndarray) -> list[str]:
        return name_pairs(self.start.pairs, "train", examples.tolist())

    def summarise(self, sums: dict[str, float], batch: np.ndarray) -> dict[str, float]:
        self.start.judge(sums, len(batch))
        row = {name: value / len(batch) for name, value in sums.items()}
        # Nats per token, as language-model losses are given; everything else is a mean over pairs.
        row["nll/chosen"] = sums["nll/chosen"] / float(self.response_lengths[self.sides[batch, 0]].sum())
        return row


def start(job: Job, loop: LoopParams) -> tuple[Engine, PreferenceTask, nn.Module]:
    """Engine, task and policy of one rank; no reference model is loaded."""
    trainable = TypeAdapter(Trainable).validate_python(job.settings["trainable"])
    with divided_from_the_start(loop, micro_steps=micro_steps_for(loop)):
        model = load_policy_start(Path(job.paths["model"]))
    model = select_trainable(model, trainable)
    if loop.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    disable_dropout(model).train()
    task = open_task(job)
    engine = Engine(ResponseLogps(model, loop.logps_chunk_tokens), loop, micro_steps=micro_steps_for(loop))
    return engine, task, model


def open_task(job: Job, *, split: str = "train", most: int | None = None) -> PreferenceTask:
    names = ("objective", "hyperparameters", "reward_beta", "drift_tolerance")
    paths = (Path(job.paths[name]) for name in ("pairs", "reference"))
    return PreferenceTask(*paths, **{name: job.settings[name] for name in names}, split=split, most=most)


def held_out(job: Job, loop: LoopParams) -> HeldOutPairs | None:
    """Pairs of the test split to measure while training, if the params ask for it."""
    every = job.settings["evaluate_every"]
    if not every:
        return None
    return HeldOutPairs(open_task(job, split="test", most=job.settings["evaluate_pairs"]), loop, every=every)
