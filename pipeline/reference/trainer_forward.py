"""The trainer's own forward of one response at a time, outside training: what drift is measured against."""

from pathlib import Path

import numpy as np

from cache import response_key
from pipeline.errors import RunFailed
from pipeline.progress import activity

_CHUNK_TOKENS = 1024  # response tokens whose vocabulary-wide float32 logits exist at once


class TrainerForward:
    """A reference model in transformers with the trainer's head; called with one response, it gives its log-probs."""

    def __init__(self, model: Path, dtype: str, *, trust_remote_code: bool = False) -> None:
        """model: a transformers folder; dtype: "float32" or "bfloat16", what the weights are cast to."""
        import torch
        from transformers.utils import logging

        from pipeline.forward.logps import ResponseLogps
        from pipeline.model.opening import open_model

        self.model, self.dtype = model, dtype
        logging.disable_progress_bar()
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        with activity(f"loading {model} in transformers"):
            loaded = open_model(model, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code)
            self._logps = ResponseLogps(loaded.to(self.device), _CHUNK_TOKENS)

    def __call__(self, prompt: np.ndarray, response: np.ndarray) -> np.ndarray:
        """Token log-probs of the response in nats, (response length,) float32; RunFailed where one is not finite."""
        import torch

        from pipeline.forward.logps import collate

        # One row at a time: padding would cost more than it saves, and the longest row sets the peak memory.
        with torch.inference_mode():
            found: np.ndarray = self._logps(*collate([(prompt, response)]).to(self.device)).float().cpu().numpy()
        if not np.isfinite(found).all():
            raise RunFailed(
                f"{self.model} gives log-probs in {self.dtype} that are not finite, for response "
                f"{response_key(prompt.tolist(), response.tolist()).hex()}. Training in it would fail in the same way; "
                "set train.dtype to float32, or choose another model."
            )
        return found
