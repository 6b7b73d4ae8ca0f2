"""Takes vLLM's place in the real engine process, where a test needs dozens of starts.

Everything around it is real: the stage, the process, the pipe, the protocol, the kills; and so are its numbers: a
forward of a small Qwen2 in numpy, one row after the other, so that they depend on nothing else in the call. It starts
in a second.

$REFCACHE_STAND_IN is JSON of what to do; calls of the probe at start-up count for nothing:
  asked    file that gets one line per call: the rows asked, as JSON of [prompt ids, response ids]
  poison   a token id; a call with a response that ends in it ends this process by SIGKILL
  stuck    a token id; a call with a response that ends in it stops this process by SIGSTOP
  hold     [n, file or FIFO]: stop by SIGSTOP in call n (from 1), after having written there
  wait     [token id, FIFO]; a call with a response that ends in it waits until somebody opens and closes the FIFO
  constant a log-prob that every token gets, without a forward, for measurements of what is around an engine
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

from pipeline.engine.probe import probe_rows
from pipeline.engine.rows import EngineLength

Row = tuple[np.ndarray, np.ndarray]


def on_cpu() -> bool:
    return True


class VLLMEngine:
    def __init__(self, model: Path, *, length: EngineLength, **ignored: Any) -> None:
        self.wish = json.loads(os.environ.get("REFCACHE_STAND_IN", "{}"))
        if os.path.exists(self.wish.get("unready", "")):
            raise RuntimeError("not ready to load a model")
        self.model = Qwen2(model)
        self.probe = _as_lists(probe_rows(self.model.config["vocab_size"], length.max_model_len - 1))
        self.calls = 0

    def score(self, rows: Sequence[Row], on_finished: Callable[[int, int], None]) -> tuple[list[np.ndarray], int, int]:
        if _as_lists(rows) != self.probe:
            self._misbehave(rows)
            if "constant" in self.wish:
                on_finished(len(rows), sum(len(prompt) + len(response) for prompt, response in rows))
                return [np.full(len(response), self.wish["constant"], np.float32) for _, response in rows], 0, 0
        found = []
        for prompt, response in rows:
            logps = self.model.logps(np.concatenate([prompt, response])[:-1])[len(prompt) - 1 :]
            found.append(np.take_along_axis(logps, response[:, None].astype(np.int64), 1)[:, 0].astype(np.float32))
            on_finished(1, len(prompt) + len(response))
        return found, 0, 0

    def _misbehave(self, rows: Sequence[Row]) -> None:
        self.calls += 1
        if "asked" in self.wish:
            with open(self.wish["asked"], "a") as file:  # one write, so that a kill can't tear the line
                file.write(json.dumps(_as_lists(rows)) + "\n")
        if self.calls == self.wish.get("hold", [0])[0]:
            Path(self.wish["hold"][1]).write_text("held\n")
            os.kill(os.getpid(), signal.SIGSTOP)
        last = {int(response[-1]) for _, response in rows}
        if self.wish.get("wait", [None])[0] in last:
            Path(self.wish["wait"][1]).read_text()
        if self.wish.get("poison") in last:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.wish.get("stuck") in last:
            os.kill(os.getpid(), signal.SIGSTOP)


class Qwen2:
    """The forward in float64 of a model with tied embeddings."""

    def __init__(self, folder: Path) -> None:
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        stored = load_file(folder / "model.safetensors")
        self.weights = {name: value.astype(np.float64) for name, value in stored.items()}

    def logps(self, ids: np.ndarray) -> np.ndarray:
        """Log-probs of whatever token follows each of `ids`: nats, (len(ids), vocabulary)."""
        embeddings = self.weights["model.embed_tokens.weight"]
        states = embeddings[ids]
        for layer in range(self.config["num_hidden_layers"]):
            name = f"model.layers.{layer}."
            states = states + self._attention(name + "self_attn.", self._norm(name + "input_layernorm", states))
            inner = self._norm(name + "post_attention_layernorm", states)
            gate = self._linear(name + "mlp.gate_proj", inner)
            up = self._linear(name + "mlp.up_proj", inner)
            states = states + self._linear(name + "mlp.down_proj", gate / (1 + np.exp(-gate)) * up)
        logits = self._norm("model.norm", states) @ embeddings.T
        shifted = logits - logits.max(axis=1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))

    def _linear(self, name: str, states: np.ndarray) -> np.ndarray:
        return states @ self.weights[name + ".weight"].T + self.weights.get(name + ".bias", 0.0)

    def _norm(self, name: str, states: np.ndarray) -> np.ndarray:
        scale = np.sqrt((states**2).mean(axis=1, keepdims=True) + self.config["rms_norm_eps"])
        return states / scale * self.weights[name + ".weight"]

    def _attention(self, name: str, states: np.ndarray) -> np.ndarray:
        heads, shared = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        size, length = self.config["hidden_size"] // heads, len(states)
        rates = self.config["rope_parameters"]["rope_theta"] ** (-np.arange(0, size, 2) / size)
        angles = np.tile(np.outer(np.arange(length), rates), 2)

        def split(part: str, count: int) -> np.ndarray:  # (heads, length, size)
            parts = self._linear(name + part, states).reshape(length, count, size).swapaxes(0, 1)
            return parts.repeat(heads // count, axis=0)

        def rotate(parts: np.ndarray) -> np.ndarray:
            turned = np.concatenate([-parts[..., size // 2 :], parts[..., : size // 2]], axis=-1)
            return parts * np.cos(angles) + turned * np.sin(angles)

        scores = rotate(split("q_proj", heads)) @ rotate(split("k_proj", shared)).swapaxes(1, 2) / np.sqrt(size)
        scores += np.triu(np.full((length, length), -np.inf), 1)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        mixed = weights / weights.sum(axis=-1, keepdims=True) @ split("v_proj", shared)
        return self._linear(name + "o_proj", mixed.swapaxes(0, 1).reshape(length, -1))


def _as_lists(rows: Sequence[Row]) -> list[list[list[int]]]:
    return [[prompt.tolist(), response.tolist()] for prompt, response in rows]
