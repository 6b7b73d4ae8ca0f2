"""The only module that imports DeepSpeed: engine, collectives, checkpoints, gathered weights."""

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.comm as dist
import torch
from torch import Tensor, nn

from pipeline.forward.logps import ResponseLogps
from pipeline.params import LoopParams
from pipeline.training.checkpoints import complete_checkpoints, place, remove, seal


class Engine:
    """A DeepSpeed engine around a module, reduced to what the loop needs. One per rank."""

    def __init__(self, module: ResponseLogps, loop: LoopParams, *, micro_steps: int) -> None:
        """micro_steps: backward passes per optimizer step on each rank; only whether it is 1 matters."""
        init_distributed()
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.partial = any(not p.requires_grad for p in module.parameters())
        self._trained = [p for p in module.parameters() if p.requires_grad]
        self.engine, *_ = deepspeed.initialize(
            model=module, model_parameters=self._trained, config=_config(loop, micro_steps, self.ranks)
        )
        self.device = self.engine.device
        self._loss_scale = micro_steps * self.ranks
        # Then parameters and gradients are torch's own, and torch's AdamW takes them as they are.
        self._plain = loop.zero_stage == 0 and loop.dtype == "float32"
        if self._plain:
            module.accumulate_in_place()
        self._grad_norm = 0.0

    def __call__(self, *args: Any) -> Tensor:
        found: Tensor = self.engine(*args)
        return found

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """loss: this micro-batch's share of the batch loss; shares of all ranks and micro-batches add up to it.

        last: of the batch. Batches may differ in how many they have, but not ranks.
        """
        self.engine.set_gradient_accumulation_boundary(last)
        if not self._plain:
            # DeepSpeed averages over micro-batches and ranks; we want the sum.
            self.engine.backward(loss * self._loss_scale)
            return
        # DeepSpeed would add up over ranks, also of one, in a copy of all gradients.
        with self.engine.no_sync():
            self.engine.backward(loss, scale_wrt_gas=False)
        if last:
            for gradient in self._gradients():
                dist.all_reduce(gradient)

    def _gradients(self) -> list[Tensor]:
        """Gradients of all that trains; zeros where this rank's micro-batches did without what others' may use."""
        for parameter in self._trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return [parameter.grad for parameter in self._trained if parameter.grad is not None]

    def step(self) -> None:
        """Count one micro-batch; on the last of a batch, clip and update."""
        if self._plain and self.engine.is_gradient_accumulation_boundary():
            # DeepSpeed clips plain float32 gradients without keeping their norm.
            self._grad_norm = float(torch.nn.utils.get_total_norm(self._gradients()))
        self.engine.step()

    @property
    def updates(self) -> int:
        """Optimizer steps made so far, those before a resumed checkpoint included."""
        return int(self.engine.global_steps)

    def set_learning_rate(self, learning_rate: float) -> None:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate

    def grad_norm(self) -> float:
        """Global gradient norm of the last update, before clipping."""
        return self._grad_norm if self._plain else float(self.engine.get_global_grad_norm())

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        dist.all_reduce(values)
        return values

    def weights_are_finite(self) -> bool:
        """Whether no parameter of any rank holds NaN or inf. Collective."""
        parts = (getattr(parameter, "ds_tensor", parameter) for parameter in self.engine.module.parameters())
        # The extremes are NaN if any element is; isfinite would make arrays as large as the parameter.
        bad = sum(int(not torch.stack(torch.aminmax(part.detach())).isfinite().all()) for part in parts if part.numel())
        return self.sum_over_ranks(torch.tensor(float(bad), device=self.device)).item() == 0

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank, in their order. Collective."""
        found: list[Any] = [None] * self.ranks
        torch.distributed.all_gather_object(found, value)
        return found

    def save_checkpoint(self, folder: Path, step: int, *, beside: Sequence[Path] = ()) -> None:
        """Write a checkpoint; it counts only once its marker, written last, is there.

        beside: files of rank 0 that belong to this step; copies go into the checkpoint.
        """
        if self.rank == 0:
            remove(folder, step)
        dist.barrier()
        self.engine.save_checkpoint(
            str(folder),
            tag=place(folder, step).name,
            save_latest=False,
            exclude_frozen_parameters=self.partial,
            client_state={"step": step},
        )
        dist.barrier()
        if self.rank == 0:
            for file in beside:
                shutil.copyfile(file, place(folder, step) / file.name)
            seal(folder, step)
        dist.barrier()

    def load_newest_checkpoint(self, folder: Path) -> int:
        """Restore the newest complete checkpoint; returns its step, 0 if there is none."""
        steps = complete_checkpoints(folder)
        if not steps:
            return 0
        self.engine.load_checkpoint(
            str(folder),
            tag=place(folder, steps[-1]).name,
            load_module_strict=not self.partial,
            load_lr_scheduler_states=False,
        )
        return steps[-1]

    def gathered_state(self, module: nn.Module, *, trained_only: bool) -> dict[str, Tensor]:
        """Full weights by parameter name on rank 0 (empty elsewhere), one parameter at a time under ZeRO-3."""
        state = {}
        for name, parameter in module.named_parameters():
            if trained_only and not parameter.requires_grad:
                continue
            with _whole(parameter):
                if self.rank == 0:
                    whole = parameter.detach().cpu()
                    # ZeRO's are parts of its flat arrays, or gone when they are divided again.
                    state[name] = (whole if self._plain else whole.clone()).contiguous()
        return state


def init_distributed() -> None:
    # Only DeepSpeed's inference uses this op, yet every start would load it: compiled for 35 s the first time, behind a
    # lock file that a killed rank leaves for all later ones to wait on for ever, with 66 MiB a rank left in /dev/shm.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # gloo on CPU: DeepSpeed's own CPU backend wants oneCCL.
    deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo")


@contextlib.contextmanager
def divided_from_the_start(loop: LoopParams, *, micro_steps: int) -> Iterator[None]:
    """Under ZeRO-3, a model that transformers loads in this block has its parameters divided among the ranks at once.

    Otherwise every rank would hold all of it until the engine divides it.
    """
    if loop.zero_stage != 3:
        yield
        return
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    init_distributed()
    in_force = HfDeepSpeedConfig(_config(loop, micro_steps, dist.get_world_size()))  # transformers holds it weakly
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del in_force


def leave_distributed() -> None:
    dist.destroy_process_group()


def _whole(parameter: nn.Parameter) -> contextlib.AbstractContextManager[Any]:
    if hasattr(parameter, "ds_id"):
        gathered: contextlib.AbstractContextManager[Any] = deepspeed.zero.GatheredParameters([parameter])
        return gathered
    return contextlib.nullcontext()


def _config(loop: LoopParams, micro_steps: int, ranks: int) -> dict[str, Any]:
    # Without offload, torch's own AdamW: DeepSpeed's kernels would be compiled on first use, and need nvcc on GPUs.
    adamw: dict[str, Any] = {
        "lr": loop.learning_rate,
        "betas": loop.adam_betas,
        "eps": loop.adam_epsilon,
        "weight_decay": loop.weight_decay,
        "torch_adam": not loop.optimizer_offload or not torch.cuda.is_available(),
    }
    if adamw["torch_adam"]:
        adamw["fused"] = True  # in one pass, without temporaries as large as a parameter (under ZeRO, as all of them)
    # Without ZeRO, DeepSpeed has no float32 master weights beside bf16 ones; its stage 1 has, also on one rank.
    zero: dict[str, Any] = {"stage": max(1, loop.zero_stage) if loop.dtype == "bfloat16" else loop.zero_stage}
    if loop.optimizer_offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    micro_size = loop.batch_size // (micro_steps * ranks) or 1
    return {
        # DeepSpeed checks train = micro * accumulation * ranks; our micro-batches may be uneven, so nominal.
        "train_micro_batch_size_per_gpu": micro_size,
        "gradient_accumulation_steps": micro_steps,
        "train_batch_size": micro_size * micro_steps * ranks,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,  # or it insists on its compiled Adam
        "gradient_clipping": loop.max_grad_norm,
        "optimizer": {"type": "AdamW", "params": adamw},
        "bf16": {"enabled": loop.dtype == "bfloat16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": 10**9,
    }
