"""Synthetic rows of a reference cache; row i is the same whoever makes it."""

import numpy as np
import pyarrow as pa

from cache import ReferenceIdentity, logps_table, prompt_key, response_key

PROMPTS_SHARE = 3  # responses per prompt


def identity(**changes: str | None) -> ReferenceIdentity:
    fields = {"weights": "a1" * 32, "config": "b2" * 32, "adapter": None, "dtype": "float32", "quantization": None}
    return ReferenceIdentity(**(fields | {"engine": "vllm", "engine_version": "0.32.0"} | changes))


def make_rows(start: int, stop: int, *, shift: float = 0.0) -> pa.Table:
    """Rows start..stop-1; `shift` lowers every log-prob, as another model would."""
    ids = [[i % 1000, i // 1000, *range(i % 7)] for i in range(start, stop)]
    prompts = [[5, i // PROMPTS_SHARE] for i in range(start, stop)]
    logps = [-np.abs(np.sin(np.arange(1, len(row) + 1) * (i + 1))) - shift for i, row in enumerate(ids, start)]
    return logps_table(
        response_keys=[response_key(prompt, row) for prompt, row in zip(prompts, ids, strict=True)],
        prompt_keys=[prompt_key(prompt) for prompt in prompts],
        n_prompt_tokens=[len(prompt) for prompt in prompts],
        token_ids=ids,
        token_logps=logps,
    )


def keys_of(rows: pa.Table) -> list[bytes]:
    keys: list[bytes] = rows["response_key"].to_pylist()
    return keys
