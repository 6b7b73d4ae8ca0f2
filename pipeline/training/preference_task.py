"""The ranks' side of preference training: pairs with their cached reference values, the policy, the objective."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import Tensor

from pipeline.auxdpo.offsets import Offsets, summarise_shares
from pipeline.auxdpo.rank_share import open_offsets, require_adapter
from pipeline.data.tables import name_examples
from pipeline.forward.kernels import choose_kernels
from pipeline.forward.layout import choose_layout
from pipeline.forward.logps import ResponseLogps, sequence_sums
from pipeline.forward.steadiness import require_steady
from pipeline.model.opening import open_model
from pipeline.model.parts import causal_model, disable_dropout
from pipeline.objectives import OBJECTIVES, FeedbackLogps, PairLogps, kto
from pipeline.params import AuxDPO, LoopParams, Trainable
from pipeline.tokens.examples import Examples, Places
from pipeline.trainable.selection import select_trainable
from pipeline.training.deepspeed_engine import Engine, divided_from_the_start
from pipeline.training.held_out import HeldOutPairs
from pipeline.training.job import Job
from pipeline.training.loop import TrainingRun, micro_steps_for
from pipeline.training.pairs import PairBatches
from pipeline.training.start_check import StartCheck


class PreferenceTask:
    """Mean of an objective over the pairs of the batch; the reference is two float64 columns."""

    feedback = False  # whether examples are rows of feedback instead of pairs

    def __init__(
        self,
        examples: Examples,
        pairs: Path,
        reference: Path,
        *,
        hyperparameters: dict[str, Any],
        objective: str = "",
        reward_beta: float,
        drift_tolerance: float,
        layout: str,
    ) -> None:
        """examples: with their reference sums. objective: a key of OBJECTIVES. layout: "padded", "packed" or
        "shared_prompts". reward_beta: inverse temperature of the reward metrics.

        pairs, reference: where people find what the examples were made of, for messages.
        drift_tolerance: nats a response by which the policy may differ from the cached reference at the start.
        """
        self.objective, self.hyperparameters = OBJECTIVES.get(objective), hyperparameters
        self.offsets: Offsets | None = None  # AuxDPO's; they take the objective's place
        self.kernels: dict[str, str] = {}  # which ones the policy has, for the metrics
        self.beta = reward_beta
        self.pairs = PairBatches(examples, layout)
        self.layout, self.lengths, self.groups = layout, self.pairs.lengths, self.pairs.groups
        self.start = StartCheck(reference, pairs, drift_tolerance, feedback=self.feedback)
        assert examples.reference_sums is not None
        self.reference_logps = examples.reference_sums

    def tokens(self, examples: np.ndarray) -> int:
        return self.pairs.tokens(examples)

    def loss(self, engine: Engine, micro: np.ndarray, batch: np.ndarray) -> tuple[Tensor, dict[str, Tensor]]:
        tokens, places = self.pairs.batch(micro)
        tokens = tokens.to(engine.device)
        sums = sequence_sums(engine(*tokens), tokens.rows, int(places.max()) + 1)
        pair = self._pair_logps(sums.index_select(0, torch.from_numpy(places).to(sums.device)), micro)
        losses, explained = self._losses(pair, micro, batch)
        found = self._sums(pair, losses.detach(), micro) | explained
        if engine.updates == 0:
            found |= self.start.observe(pair, micro)
        return losses.sum() / len(batch), found

    def _losses(self, pair: PairLogps, micro: np.ndarray, batch: np.ndarray) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of each pair, (B,), and sums that only this objective has."""
        if self.offsets is not None:
            return self.offsets.losses(pair, micro, batch)
        assert self.objective is not None
        return self.objective(pair, **self.hyperparameters), {}

    def _pair_logps(self, policy: Tensor, micro: np.ndarray) -> PairLogps:
        chosen, rejected = policy.chunk(2)
        reference = torch.tensor(self.reference_logps[micro].T, dtype=torch.float32, device=policy.device)
        lengths = torch.tensor(self.pairs.response_lengths[micro].T, device=policy.device)
        return PairLogps(chosen, rejected, reference[0], reference[1], lengths[0], lengths[1])

    def _sums(self, pair: PairLogps, losses: Tensor, micro: np.ndarray) -> dict[str, Tensor]:
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
        return name_examples(self.start.pairs, "train", examples.tolist(), feedback=self.feedback)

    def summarise(self, sums: dict[str, float], batch: np.ndarray) -> dict[str, float]:
        self.start.judge(sums, len(batch))
        row = {name: value / len(batch) for name, value in sums.items()}
        # Nats per token, as language-model losses are given; everything else is a mean over pairs.
        row["nll/chosen"] = sums["nll/chosen"] / float(self.pairs.response_lengths[batch, 0].sum())
        return row if self.offsets is None else summarise_shares(row)


class FeedbackTask(PreferenceTask):
    """KTO over the rows of feedback of the batch; each goes with the mismatched response that its baseline is made of.

    Columns of the history are those of pairs as far as they have a meaning: chosen for desirable, rejected for
    undesirable, each a mean over its own rows (0 where the batch has none); accuracies: on the right side of the
    baseline; kl: the baseline, nats.
    """

    feedback = True

    def _losses(self, pair: PairLogps, micro: np.ndarray, batch: np.ndarray) -> tuple[Tensor, dict[str, Tensor]]:
        feedback = self._feedback(pair, micro)
        return kto(feedback, **self.hyperparameters), {"kl": feedback.baseline * len(micro)}

    def _feedback(self, pair: PairLogps, micro: np.ndarray) -> FeedbackLogps:
        assert self.pairs.desirable is not None
        desirable = torch.from_numpy(self.pairs.desirable[micro]).to(pair.chosen.device)
        return FeedbackLogps(pair.chosen, pair.ref_chosen, pair.rejected, pair.ref_rejected, desirable)

    def _sums(self, pair: PairLogps, losses: Tensor, micro: np.ndarray) -> dict[str, Tensor]:
        with torch.no_grad():
            feedback = self._feedback(pair, micro)
            liked, rewards = feedback.desirable, self.beta * feedback.log_ratio
            above = feedback.log_ratio > feedback.baseline
            return {
                "loss": losses.sum(),
                "rewards/chosen": rewards[liked].sum(),
                "rewards/rejected": rewards[~liked].sum(),
                "rewards/accuracies": (above == liked).sum(),
                "logps/chosen": pair.chosen[liked].sum(),
                "logps/rejected": pair.chosen[~liked].sum(),
                "dcr": (rewards[liked] < 0).sum(),
                "nll/chosen": -pair.chosen[liked].sum(),
                _DESIRABLE: liked.sum(),
            }

    def summarise(self, sums: dict[str, float], batch: np.ndarray) -> dict[str, float]:
        assert self.pairs.desirable is not None
        self.start.judge(sums, len(batch))
        liked = sums.pop(_DESIRABLE)
        tokens = float(self.pairs.response_lengths[batch, 0][self.pairs.desirable[batch]].sum())
        counts = dict.fromkeys(sums, float(len(batch)))
        counts |= dict.fromkeys(("rewards/chosen", "logps/chosen", "dcr"), liked)
        counts |= dict.fromkeys(("rewards/rejected", "logps/rejected"), len(batch) - liked) | {"nll/chosen": tokens}
        row = {name: value / max(counts[name], 1.0) for name, value in sums.items()}
        row["rewards/margins"] = row["rewards/chosen"] - row["rewards/rejected"]
        return row


_DESIRABLE = "desirable"


def start(job: Job, loop: LoopParams) -> TrainingRun:
    """One rank's share; no reference model is loaded."""
    trainable = TypeAdapter(Trainable).validate_python(job.settings["trainable"])
    with divided_from_the_start(loop, micro_steps=micro_steps_for(loop)):
        start_model = open_model(
            Path(job.paths["model"]),
            dtype=torch.float32,  # masters
            trust_remote_code=job.settings.get("trust_remote_code", False),
        )
    model = select_trainable(start_model, trainable)
    if loop.activation_checkpointing:
        causal_model(model).gradient_checkpointing_enable({"use_reentrant": False})
    require_steady(disable_dropout(model))
    layout = choose_layout(model, loop.layout, best="shared_prompts")
    kernels = choose_kernels(model, layout, loop)
    model.train()
    task = open_task(job, layout)
    task.kernels = kernels
    offset_params = _offset_params(job)
    if offset_params:
        require_adapter(Path(job.paths["sketches"]), model)
    engine = Engine(ResponseLogps(model, loop.logps_chunk_tokens), loop, micro_steps=micro_steps_for(loop))
    if offset_params:
        task.offsets = open_offsets(
            Path(job.paths["sketches"]), task.pairs.examples.key_table, task.groups, offset_params, engine
        )
    return TrainingRun(engine, task, model, _held_out(job, loop, task), task.offsets)


def _offset_params(job: Job) -> AuxDPO | None:
    if job.settings["objective"] != "auxdpo":
        return None
    return AuxDPO.model_validate({"objective": "auxdpo"} | job.settings["hyperparameters"])


def open_task(job: Job, layout: str, *, split: str = "train") -> PreferenceTask:
    """Without offsets: those of held-out pairs are zero, where AuxDPO's loss is DPO's."""
    names = ("objective", "hyperparameters", "reward_beta", "drift_tolerance")
    settings = {name: job.settings[name] for name in names}
    examples = Examples(Places(*job.examples[split]))
    paths = (Path(job.paths[name]) for name in ("pairs", "reference"))
    if settings["objective"] == "kto":
        return FeedbackTask(examples, *paths, **settings, layout=layout)
    if settings["objective"] == "auxdpo":
        settings |= {"objective": "dpo", "hyperparameters": {"beta": settings["reward_beta"]}}
    return PreferenceTask(examples, *paths, **settings, layout=layout)


def _held_out(job: Job, loop: LoopParams, task: PreferenceTask) -> HeldOutPairs | None:
    """Pairs of the test split to measure while training, if the params ask for it."""
    every = job.settings["evaluate_every"]
    if not every:
        return None
    return HeldOutPairs(open_task(job, task.layout, split="test"), loop, every=every)
