"""Three ways to the log-prob of a response token out of one vLLM engine; probe.py tells whether one is right.

Each reads the tokens that the engine computed, from the end: with prefix caching the beginning may be skipped. vLLM's
own classes are made in vllm_engine.py.
"""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from pipeline.engine.answers import ranked_logps
from pipeline.forward.saved_head import load_output_head
from pipeline.model.limits import model_limits
from pipeline.sketches.head import HeadSketcher
from pipeline.sketches.head_plan import HeadPlan, HeadSketch

LOGITS_BYTES = 1 << 30  # what vocabulary-wide arrays may take at once
_BYTES_PER_LOGIT = 32  # measured 24: logits, log-probs and what ranking them takes; and holes in the heap


# vLLM has no request for no token; the sampled one is thrown away.
_ONE_TOKEN = {"max_tokens": 1, "temperature": 0.0, "detokenize": False}


class Backend(ABC):
    """What to tell the engine, what to ask for a row, and how to read the answer.

    pooling_task: of an engine that gives states instead of tokens; None for one that samples.
    """

    pooling_task: ClassVar[str | None] = None
    convert: ClassVar[str] = "auto"  # EngineArgs.convert, where there is a pooling task

    def __init__(self, model: Path, *, trust_remote_code: bool, plan: HeadPlan | None = None) -> None:
        """plan: sketches of the head's gradient to give beside log-probs; only HiddenStates can."""
        if plan is not None:
            raise ValueError(f"{type(self).__name__} has no hidden states, so it can't sketch the head's gradient")
        self.vocabulary = model_limits(model, trust_remote_code=trust_remote_code).vocabulary

    def begin_pass(self, block_size: int) -> None:
        """Called before requests that may share blocks of `block_size` tokens with each other, but not with others."""
        self.block_size = block_size

    def may_share(self, prompt: np.ndarray) -> bool:
        """Whether skipping the prompt's whole blocks leaves every response token with an answer.

        Where blocks end with the prompt, they take the state that predicts the first response token along, and each
        row would have to be scored again.
        """
        return len(prompt) % self.block_size != 0

    def step_budget(self, wanted: int, max_model_len: int) -> dict[str, Any]:
        """vLLM computes logits for all tokens of a step, so the vocabulary bounds the step."""
        bounded = max(32, LOGITS_BYTES // (_BYTES_PER_LOGIT * self.vocabulary))
        return {"max_num_batched_tokens": min(wanted, bounded), "enable_chunked_prefill": True}

    @abstractmethod
    def request(self, prompt: np.ndarray, response: np.ndarray) -> dict[str, Any]:
        """Arguments of vLLM's SamplingParams, or of its PoolingParams where there is a pooling task."""

    @abstractmethod
    def read(self, output: Any, prompt: np.ndarray, response: np.ndarray) -> np.ndarray:
        """Log-probs of the last computed tokens of the response, nats, float32, (<= response length,)."""

    def read_ranked(self, output: Any, prompt: np.ndarray, response: np.ndarray) -> np.ndarray:
        """As `read`, with each token's rank beside its log-prob, 1 for the likeliest: (<= response length, 2)."""
        raise NotImplementedError

    def read_sketch(
        self, output: Any, prompt: np.ndarray, response: np.ndarray
    ) -> tuple[np.ndarray, HeadSketch | None]:
        """As `read`, with the sketch of the whole response where every token of it was computed."""
        raise NotImplementedError


class PromptLogprobs(Backend):
    """`prompt_logprobs`: works everywhere, computes logits and ranks for every computed token."""

    def request(self, prompt: np.ndarray, response: np.ndarray) -> dict[str, Any]:
        # flat_logprobs: a third of the memory of one object per token.
        return _ONE_TOKEN | {"prompt_logprobs": 0, "flat_logprobs": True}

    def read(self, output: Any, prompt: np.ndarray, response: np.ndarray) -> np.ndarray:
        return self.read_ranked(output, prompt, response)[:, 0].astype(np.float32)

    def read_ranked(self, output: Any, prompt: np.ndarray, response: np.ndarray) -> np.ndarray:
        # vLLM leaves uninitialised memory where it skipped; position P - 1 + i answers for response token i.
        computed = computed_tokens(output, prompt, response)
        try:
            return ranked_logps(output.prompt_logprobs, response[len(response) - computed :])
        except ValueError:  # about other tokens than these
            return np.empty((0, 2))


class TokenIds(Backend):
    """Fixed-id scoring (`prompt_logprob_token_ids`, vLLM >= 0.32 on CUDA): response rows only, no ranks."""

    def step_budget(self, wanted: int, max_model_len: int) -> dict[str, Any]:
        return {"max_num_batched_tokens": wanted}  # the runner that can do this computes logits in chunks of its own

    def request(self, prompt: np.ndarray, response: np.ndarray) -> dict[str, Any]:
        ids = response.astype(np.int32)[:, None]
        return _ONE_TOKEN | {"prompt_logprob_token_ids": ids, "prompt_logprob_start": len(prompt) - 1}

    def read(self, output: Any, prompt: np.ndarray, response: np.ndarray) -> np.ndarray:
        found = output.prompt_token_id_logprobs
        # None where the engine skipped beyond the prompt; anything but (R, 1) is another version's layout.
        if found is None or np.shape(found) != (len(response), 1):
            return np.empty(0, np.float32)
        return np.asarray(found, dtype=np.float32)[:, 0]


class HiddenStates(Backend):
    """The engine as a `token_embed` pooling model; the output head is ours, in chunks, for response rows only."""

    pooling_task = "token_embed"
    convert = "embed"
    CHUNK_TOKENS: ClassVar[int] = 1024
    KEPT_ENDS: ClassVar[int] = 2  # of a response's first blocks; siblings seldom begin alike for longer

    def __init__(self, model: Path, *, trust_remote_code: bool, plan: HeadPlan | None = None) -> None:
        super().__init__(model, trust_remote_code=trust_remote_code)
        chunk = max(16, min(self.CHUNK_TOKENS, LOGITS_BYTES // (_BYTES_PER_LOGIT * self.vocabulary)))
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.head = load_output_head(model, chunk, trust_remote_code=trust_remote_code).to(self.device)
        self.sketcher = HeadSketcher(self.head, plan) if plan is not None else None
        # States at the ends of blocks, by the tokens before them: what predicts the first token behind skipped blocks.
        self._ends: dict[tuple[bytes, bytes], torch.Tensor] = {}

    def begin_pass(self, block_size: int) -> None:
        super().begin_pass(block_size)
        self._ends.clear()

    def may_share(self, prompt: np.ndarray) -> bool:
        return True  # the sibling that computed the blocks has left their last state

    def step_budget(self, wanted: int, max_model_len: int) -> dict[str, Any]:
        return {"max_num_batched_tokens": wanted, "enable_chunked_prefill": True}

    def request(self, prompt: np.ndarray, response: np.ndarray) -> dict[str, Any]:
        return {"use_activation": False}  # it would normalise the states

    def read(self, output: Any, prompt: np.ndarray, response: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            logps: np.ndarray = self.head(*self._predicting(output, prompt, response)).cpu().numpy()
            return logps

    def read_sketch(
        self, output: Any, prompt: np.ndarray, response: np.ndarray
    ) -> tuple[np.ndarray, HeadSketch | None]:
        assert self.sketcher is not None
        with torch.inference_mode():
            predicting, targets = self._predicting(output, prompt, response)
            if len(targets) < len(response):
                return self.head(predicting, targets).cpu().numpy(), None
            logps, sketch = self.sketcher(predicting, targets)
            return logps.cpu().numpy(), sketch

    def _predicting(self, output: Any, prompt: np.ndarray, response: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """The states that predict the last computed tokens of the response, (n, hidden) float32, and these, (n,)."""
        states = output.outputs.data
        # After a preemption vLLM may return states twice; any disagreement means: don't trust, score again.
        trusted = len(states) == len(prompt) + len(response) - output.num_cached_tokens
        computed = computed_tokens(output, prompt, response) if trusted else 0
        # The state at a token predicts the next one, so the last state predicts nothing of ours.
        predicting = states[len(states) - 1 - computed : len(states) - 1]
        if trusted:
            self._keep_ends(states, output.num_cached_tokens, prompt, response)
            skipped = len(response) - computed
            before = self._ends.get((prompt.tobytes(), response[: skipped - 1].tobytes())) if skipped else None
            if before is not None:
                predicting, computed = torch.cat([before[None], predicting]), computed + 1
        targets = torch.from_numpy(response[len(response) - computed :].astype(np.int64))
        return predicting.to(self.device, torch.float32), targets.to(self.device)

    def _keep_ends(self, states: torch.Tensor, first: int, prompt: np.ndarray, response: np.ndarray) -> None:
        """states: those at positions `first` and after it of prompt and response, (n, hidden)."""
        ends = range(-(-len(prompt) // self.block_size) * self.block_size, first + len(states), self.block_size)
        for end in ends[: self.KEPT_ENDS]:
            if end > first:
                key = (prompt.tobytes(), response[: end - len(prompt)].tobytes())
                self._ends.setdefault(key, states[end - 1 - first].clone())


class Classes(Backend):
    """A sequence-classification model's logits of whole sequences, as reward models give; no log-probs."""

    pooling_task = "classify"

    def step_budget(self, wanted: int, max_model_len: int) -> dict[str, Any]:
        # Pooled from the last token's state, so a sequence must lie in one step.
        return {"max_num_batched_tokens": max(wanted, max_model_len), "enable_chunked_prefill": False}

    def request(self, prompt: np.ndarray, response: np.ndarray) -> dict[str, Any]:
        return {"use_activation": False}  # the logit, and no probability of a single class

    def read(self, output: Any, prompt: np.ndarray, response: np.ndarray) -> np.ndarray:
        logits: np.ndarray = output.outputs.data.float().cpu().numpy().reshape(-1)
        return logits


def computed_tokens(output: Any, prompt: np.ndarray, response: np.ndarray) -> int:
    """How many response tokens, counted from the end, the engine has an answer for: those it did not skip."""
    skipped: int | None = output.num_cached_tokens
    if skipped is None:  # it doesn't say; then nothing can be trusted
        return 0
    return max(0, min(len(response), len(prompt) + len(response) - 1 - skipped))


BACKENDS: dict[str, type[Backend]] = {
    "token_ids": TokenIds,
    "hidden_states": HiddenStates,
    "prompt_logprobs": PromptLogprobs,
    "classes": Classes,
}
