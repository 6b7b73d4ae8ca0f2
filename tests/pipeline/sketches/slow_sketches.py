"""Sketches the slow way, from the documentation alone: Philox in whole numbers, and every element of the gradient."""

import copy
import hashlib
import struct

import numpy as np
import torch

MASK = (1 << 64) - 1


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x64-10: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", 2011, section 3.3."""
    counter, key = list(counter), list(key)
    for _ in range(10):
        a, b = 0xD2E7470EE14C6C93 * counter[0], 0xCA5A826395121157 * counter[2]
        counter = [(b >> 64) ^ counter[1] ^ key[0], b & MASK, (a >> 64) ^ counter[3] ^ key[1], a & MASK]
        key = [(key[0] + 0x9E3779B97F4A7C15) & MASK, (key[1] + 0xBB67AE8584CAA73B) & MASK]
    return counter


def words(name: str, axis: str, size: int, seed: int, purpose: str) -> list[int]:
    message = struct.pack("<Iq", 1, seed) + b"".join(part.encode() + b"\0" for part in (purpose, axis, name))
    key = struct.unpack("<QQ", hashlib.blake2b(message, digest_size=16, person=b"refcache").digest())
    blocks = [philox([block, 0, 0, 0], key) for block in range(1, size // 4 + 2)]
    return [word for block in blocks for word in block][:size]


def slow_sketch(name: str, gradient: torch.Tensor, k: int, *, seed: int, purpose: str) -> np.ndarray:
    """The TensorSketch of a matrix, or the count sketch of a vector, element by element in float64; (k,)."""
    axes = [np.zeros(1, np.int64), np.zeros(1, np.int64)]
    signs = [np.ones(1), np.ones(1)]
    for axis, size in enumerate(gradient.shape):
        found = words(name, ("out", "in")[axis], size, seed, purpose)
        axes[axis] = np.array([(word >> 1) % k for word in found])
        signs[axis] = np.array([-1.0 if word & 1 else 1.0 for word in found])
    sketch = np.zeros(k)
    values = gradient.double().numpy().reshape(len(axes[0]), -1) * np.outer(*signs)
    np.add.at(sketch, (axes[0][:, None] + axes[1]) % k, values)
    return sketch


def exact_gradients(model: torch.nn.Module, prompt: list[int], response: list[int]) -> dict[str, torch.Tensor]:
    """Gradient of the response's summed log-prob, by plain backward through transformers' own logits."""
    model = copy.deepcopy(model)
    model.zero_grad()
    logps = model(input_ids=torch.tensor([[*prompt, *response]])).logits[0].float().log_softmax(-1)
    sum(logps[len(prompt) - 1 + i, token] for i, token in enumerate(response)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
