"""Takes vLLM's place in the real engine process, where a test needs dozens of starts and not vLLM's own numbers.

Everything around it is real: the stage, the process, the pipe, the protocol, the kills. Its log-probs come from the
model's embeddings alone (a token given the one before it), so they depend on the weights and on the row, and on nothing
else in the call. It starts in a second.

$REFCACHE_STAND_IN is JSON of what to do:
  asked    file that gets one line per call: the rows asked, as JSON of [prompt ids, response ids]
  poison   a token id; a call with a response that ends in it ends this process by SIGKILL
  stuck    a token id; a call with a response that ends in it stops this process by SIGSTOP
  hold     [n, FIFO]: stop by SIGSTOP in call n (from 1), after having written to the FIFO
  unready  file; where it exists, the model does not load
"""

import json
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

Row = tuple[np.ndarray, np.ndarray]


class VLLMEngine:
    def __init__(self, model: Path, **ignored: Any) -> None:
        self.wish = json.loads(os.environ.get("REFCACHE_STAND_IN", "{}"))
        if os.path.exists(self.wish.get("unready", "")):
            raise RuntimeError("not ready to load a model")
        embeddings = load_file(model / "model.safetensors")["model.embed_tokens.weight"].astype(np.float64)
        logits = embeddings @ embeddings.T
        shifted = logits - logits.max(axis=1, keepdims=True)
        self.logps = (shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))).astype(np.float32)
        self.calls = 0

    def score(self, rows: Sequence[Row], on_finished: Callable[[int], None]) -> tuple[list[np.ndarray], int, int]:
        self.calls += 1
        self._record(rows)
        if self.calls == self.wish.get("hold", [0])[0]:
            Path(self.wish["hold"][1]).write_text("held\n")
            os.kill(os.getpid(), signal.SIGSTOP)
        found = []
        for prompt, response in rows:
            if response[-1] == self.wish.get("poison"):
                os.kill(os.getpid(), signal.SIGKILL)
            if response[-1] == self.wish.get("stuck"):
                os.kill(os.getpid(), signal.SIGSTOP)
            before = np.concatenate([prompt[-1:], response[:-1]])
            found.append(self.logps[before, response])
            on_finished(1)
        return found, 0, 0

    def _record(self, rows: Sequence[Row]) -> None:
        if "asked" in self.wish:
            with open(self.wish["asked"], "a") as file:  # one write, so that a kill can't tear the line
                file.write(json.dumps([[prompt.tolist(), response.tolist()] for prompt, response in rows]) + "\n")
