"""The output head's gradient out of final hidden states, sketched without a backward pass.

With logits z_t = W h_t, the gradient of sum_t log softmax(z_t)[a_t] with respect to W is sum_t (onehot(a_t) - p_t) (x)
h_t, a sum of outer products as pipeline/sketches/sums.py takes them. Vocabulary-wide arrays exist for one chunk of
tokens at a time.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.forward.head import ChunkedHead
from pipeline.sketches.hashes import AUDIT, SKETCH, hashes
from pipeline.sketches.head_plan import HEAD, HeadPlan, HeadSketch
from pipeline.sketches.sums import TensorSketchSums, by_tokens_is_cheaper, squared_norms

_ONE = slice(0, 1)  # the one example of a call


class HeadSketcher:
    """Log-probs of a response and the sketch of the head's gradient of their sum, from the states that predict it.

    head: frozen, float32. The hashes are those that a gradient pass uses for parameters of these names.
    """

    def __init__(self, head: ChunkedHead, plan: HeadPlan) -> None:
        self.head, self.names = head, plan.names
        self._device = head.weight.device
        self._sizes = {SKETCH: plan.k, AUDIT: plan.audit}
        self._hashes = {
            purpose: hashes(k, seed=plan.seed, purpose=purpose, device=self._device)
            for purpose, k in self._sizes.items()
        }

    def __call__(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, HeadSketch]:
        """hidden: (T, width), the states before the response's tokens; targets: (T,), these. Log-probs (T,), nats."""
        sums = {purpose: self._sums(purpose) for purpose in self._sizes}
        weight, bias = self.names["weight"], self.names.get("bias")
        n_out, n_in = self.head.weight.shape
        by_tokens = by_tokens_is_cheaper(len(targets), n_out, n_in, [*self._sizes.values()])
        # Products between tokens of different chunks would need all their probabilities at once.
        whole = by_tokens and len(targets) <= self.head.chunk_tokens
        gradient = None if whole else torch.zeros_like(self.head.weight)
        for_bias = torch.zeros_like(self.head.weight[:, 0])
        squared, logps = torch.zeros((), dtype=torch.float64, device=self._device), []
        step = self.head.chunk_tokens
        for states, ids in zip(hidden.split(step), targets.split(step), strict=True):
            found, delta = log_prob_gradient(self.head, states, ids)
            logps.append(found)
            if by_tokens:
                for each in sums.values():
                    each.outer(weight, delta[None], states[None], _ONE)
            if gradient is None:
                squared += squared_norms(delta[None], states[None])[0]
            else:
                gradient.addmm_(delta.T, states)
            if bias is not None:
                for_bias += delta.sum(dim=0)
        if gradient is not None:
            squared += torch.linalg.vecdot(gradient, gradient).sum(dtype=torch.float64)
        for each in sums.values():
            if not by_tokens and gradient is not None:
                each.matrix(weight, gradient[None], _ONE)
            if bias is not None:
                each.vector(bias, for_bias[None])
        if bias is not None:
            squared += for_bias.square().sum(dtype=torch.float64)
        values, audit = (sums[purpose].result()[HEAD][0].cpu().numpy() for purpose in (SKETCH, AUDIT))
        return torch.cat(logps), HeadSketch(values, audit, float(squared.clamp(min=0).sqrt()))

    def _sums(self, purpose: str) -> TensorSketchSums:
        groups = dict.fromkeys(self.names.values(), HEAD)
        return TensorSketchSums(groups, self._sizes[purpose], self._hashes[purpose], 1, self._device)


def log_prob_gradient(head: ChunkedHead, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs (T,) of `targets` and their gradient with respect to the head's linear output, (T, vocabulary)."""
    logits = F.linear(inputs, head.weight, head.bias).float() * head.scale
    slope = None
    if head.softcap is not None:
        capped = torch.tanh(logits / head.softcap)
        logits, slope = head.softcap * capped, 1 - capped.square()
    # As ChunkedHead computes them, so that the log-probs are the same bits with and without sketches.
    chosen, largest = logits.gather(1, targets[:, None])[:, 0], logits.amax(dim=1)
    delta = logits.sub_(largest[:, None]).exp_()
    total = delta.sum(dim=1)
    delta.mul_(-1 / total[:, None])
    delta[torch.arange(len(targets), device=targets.device), targets] += 1
    if slope is not None:
        delta *= slope
    if head.scale != 1.0:
        delta *= head.scale
    return chosen - (total.log() + largest), delta
