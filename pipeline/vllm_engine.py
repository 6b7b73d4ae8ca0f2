"""vLLM as an offline scorer and sampler: token ids in, log-probs or token ids out. The only module that imports vllm.

It runs inside the child process of engine_process.py; inputs were validated before they came here, because one bad row
fails a whole vLLM call and an id beyond the embeddings makes the next call hang.
"""

import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt
from vllm.platforms import current_platform

from pipeline.params import ScoreParams
from pipeline.prompt_logprobs import response_logps
from pipeline.scoring_plan import EngineLength

OnFinished = Callable[[int], None]  # called with the number of sequences that finished since the last call
Row = tuple[np.ndarray, np.ndarray]  # prompt ids and response ids, int32


class VLLMEngine:
    """One model in one in-process vLLM engine. Not safe to use again after any exception: discard the process."""

    def __init__(self, model: Path, params: ScoreParams, *, length: EngineLength, trust_remote_code: bool) -> None:
        if length.beyond_limit:
            os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"  # safe by one; see scoring_plan.engine_length
        self.llm = LLM(
            model=str(model),
            dtype=params.dtype,
            quantization=params.quantization,
            max_model_len=length.max_model_len,
            max_num_seqs=params.max_num_seqs,
            **_step_budget(params, length.max_model_len),
            tensor_parallel_size=params.tensor_parallel_size,
            enforce_eager=params.enforce_eager,
            trust_remote_code=trust_remote_code,
            skip_tokenizer_init=True,
            enable_prefix_caching=True,  # for the samples of one prompt; scored requests never read it
            generation_config="vllm",  # the model's own file would change temperature and top_p behind our back
            disable_log_stats=True,
            seed=0,
            gpu_memory_utilization=params.gpu_memory_utilization,  # on CPU cpu_kv_cache_gib takes its place
        )

    def score(self, rows: Sequence[Row], on_finished: OnFinished) -> tuple[list[np.ndarray], int, int]:
        """The fields of engine_process.Scored."""
        params = SamplingParams(
            prompt_logprobs=0,
            max_tokens=1,  # vLLM has no zero; the sampled token is thrown away
            temperature=0.0,
            detokenize=False,
            flat_logprobs=True,  # a third of the memory of one object per token
            # After a prefix hit vLLM leaves the skipped positions uninitialised.
            skip_reading_prefix_cache=True,
        )
        prompts = [TokensPrompt(prompt_token_ids=[*prompt.tolist(), *response.tolist()]) for prompt, response in rows]
        outputs = self.llm.generate(prompts, params, use_tqdm=_reporter(on_finished))
        logps = [
            response_logps(output.prompt_logprobs, response)
            for output, (_, response) in zip(outputs, rows, strict=True)
        ]
        return logps, 0, 0

    def generate(
        self,
        prompts: Sequence[np.ndarray],
        on_finished: OnFinished,
        *,
        n: int,
        max_new_tokens: int,
        seed: int,
        stop_token_ids: Sequence[int],
    ) -> list[list[list[int]]]:
        """`n` samples a prompt from the model's own distribution: temperature 1, nothing cut off.

        A stop token ends a sample and is its last token. Same arguments, same samples, whatever else is in the batch.
        """
        params = [
            SamplingParams(
                n=n,
                max_tokens=max_new_tokens,
                temperature=1.0,
                top_p=1.0,
                top_k=0,
                seed=seed * 1_000_003 + index * n,  # vLLM gives sample i of a prompt seed + i; no two share one
                stop_token_ids=list(stop_token_ids),
                detokenize=False,
            )
            for index in range(len(prompts))
        ]
        requests = [TokensPrompt(prompt_token_ids=prompt.tolist()) for prompt in prompts]
        outputs = self.llm.generate(requests, params, use_tqdm=_reporter(on_finished))
        return [[list(sample.token_ids) for sample in output.outputs] for output in outputs]


def _step_budget(params: ScoreParams, max_model_len: int) -> dict[str, Any]:
    """How many tokens one engine step takes, and whether it may take part of a prompt."""
    if not current_platform.is_cpu():
        return {"max_num_batched_tokens": params.max_num_batched_tokens}
    # A prompt cut into chunks makes vLLM 0.32 rewind its request's random generator, which CPU generators can't:
    # "CPU Generator does not use offset" ends the engine. Whole prompts then; one must fit into a step.
    budget = max(params.max_num_batched_tokens, max_model_len)
    return {"max_num_batched_tokens": budget, "enable_chunked_prefill": False}


def _reporter(on_finished: OnFinished) -> Callable[..., tqdm]:
    """vLLM draws its progress bar with any tqdm it is given; this one draws nothing and tells `on_finished`."""

    class Reporter(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.counts_requests = kwargs.get("desc") == "Processed prompts"
            super().__init__(*args, **(kwargs | {"file": io.StringIO(), "mininterval": 3600.0}))

        def update(self, n: float | None = 1) -> bool | None:
            if self.counts_requests:
                on_finished(int(n or 0))
            return super().update(n)

    return Reporter
