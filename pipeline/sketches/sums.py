"""Sketches of per-example gradients that are never written out: sums over tokens of outer products delta_t (x) x_t.

A TensorSketch (Pham and Pagh 2013) of a matrix G of (out, in) puts G[i, j] * sign(i) * sign(j) into the bucket
(bucket(i) + bucket(j)) mod k; it is linear, keeps squared norms in expectation, and for an outer product it is the
circular convolution of the two vectors' count sketches, that is a product in Fourier space. A vector is count-sketched.
Notation: n examples, T tokens each; delta (n, T, out) is the gradient of the layer's output, x (n, T, in) its input.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from pipeline.sketches.hashes import IN, OUT, AxisHash

CHUNK_NUMBERS = 1 << 22  # numbers of a temporary array, so that memory does not follow batch x tokens x k

FindHash = Callable[[str, str, int], AxisHash]  # (canonical name, axis, size)


class Sums(Protocol):
    """Adds up gradients of one batch by parameter group. rows: the examples of the batch that an argument is of."""

    @property
    def k(self) -> int | None:
        """Numbers of every group; None where only `matrix` is understood, not `outer`."""

    def outer(self, name: str, delta: Tensor, x: Tensor, rows: slice) -> None:
        """Add sum_t delta_t (x) x_t."""

    def matrix(self, name: str, gradients: Tensor, rows: slice) -> None:
        """Add gradients, (n, out, in)."""

    def lookup(self, name: str, size: int, ids: Tensor, delta: Tensor, row: int) -> None:
        """Add the gradient of an embedding with `size` rows: delta (T, width) at the rows ids (T,)."""

    def vector(self, name: str, gradients: Tensor) -> None:
        """Add gradients of a vector, (all examples, size)."""

    def result(self) -> dict[str, Tensor]:
        """(all examples, width) float32 by group."""


class TensorSketchSums:
    """Every group in k numbers; groups without any gradient are zero."""

    def __init__(self, groups: Mapping[str, str], k: int, find: FindHash, n: int, device: torch.device) -> None:
        """groups: group of each parameter, by canonical name."""
        self.groups, self.k, self.find = groups, k, find
        names = dict.fromkeys(groups.values())
        self._direct = {group: torch.zeros(n, k, device=device) for group in names}
        self._spectra: dict[str, Tensor] = {}

    def outer(self, name: str, delta: Tensor, x: Tensor, rows: slice) -> None:
        out, into = self.find(name, OUT, delta.shape[-1]), self.find(name, IN, x.shape[-1])
        total = self._spectrum(self.groups[name])
        step = max(1, CHUNK_NUMBERS // (len(delta) * self.k))
        for part, inputs in zip(delta.split(step, dim=1), x.split(step, dim=1), strict=True):
            product = torch.fft.rfft(_count_sketch(part, out, self.k)) * torch.fft.rfft(
                _count_sketch(inputs, into, self.k)
            )
            total[rows] += product.sum(dim=1)

    def matrix(self, name: str, gradients: Tensor, rows: slice) -> None:
        n, n_out, n_in = gradients.shape
        out, into = self._unfolded(name, OUT, n_out), self._unfolded(name, IN, n_in)
        buckets = (out[:, None] + into).reshape(1, -1).expand(n, -1)
        # 0 to 2k-2 for two plus signs, then as many for a minus, then for two: both folds wait for the sums, so that an
        # index costs one addition, where the modulo alone would cost as much as the gradient.
        sums = gradients.new_zeros(n, 6 * self.k).scatter_add_(1, buckets, gradients.reshape(n, -1))
        plus, minus, again = sums.view(n, 3, 2, self.k).sum(dim=2).unbind(dim=1)
        self._direct[self.groups[name]][rows] += plus - minus + again

    def lookup(self, name: str, size: int, ids: Tensor, delta: Tensor, row: int) -> None:
        out, into = self.find(name, OUT, size), self.find(name, IN, delta.shape[-1])
        buckets = (out.buckets[ids][:, None] + into.buckets) % self.k
        values = delta * into.signs * out.signs[ids][:, None]
        self._direct[self.groups[name]][row].index_add_(0, buckets.reshape(-1), values.reshape(-1))

    def vector(self, name: str, gradients: Tensor) -> None:
        axis = self.find(name, OUT, gradients.shape[-1])
        self._direct[self.groups[name]] += _count_sketch(gradients, axis, self.k)

    def result(self) -> dict[str, Tensor]:
        for group, spectrum in self._spectra.items():
            self._direct[group] += torch.fft.irfft(spectrum, n=self.k)
        self._spectra = {}
        return self._direct

    def _unfolded(self, name: str, axis: str, size: int) -> Tensor:
        """Buckets, with 2k added where the sign is minus, (size,)."""
        found = self.find(name, axis, size)
        return found.buckets + 2 * self.k * (found.signs < 0)

    def _spectrum(self, group: str) -> Tensor:
        if group not in self._spectra:
            direct = self._direct[group]
            shape = (len(direct), self.k // 2 + 1)
            self._spectra[group] = torch.zeros(shape, dtype=torch.complex64, device=direct.device)
        return self._spectra[group]


def _count_sketch(values: Tensor, axis: AxisHash, k: int) -> Tensor:
    """(..., size) -> (..., k)."""
    flat = (values * axis.signs).reshape(-1, values.shape[-1])
    buckets = axis.buckets.expand(len(flat), -1)
    # Of five ways (index_add along either axis, sparse and dense products) the fastest on a CPU, by 2 to 5 times.
    return flat.new_zeros(len(flat), k).scatter_add_(1, buckets, flat).view(*values.shape[:-1], k)


class ExactSums:
    """The gradients themselves: of each group, its parameters one after the other, each row by row."""

    k: int | None = None

    def __init__(
        self, groups: Mapping[str, str], shapes: Mapping[str, torch.Size], n: int, device: torch.device
    ) -> None:
        """shapes: of the parameters to store, by canonical name and in order; gradients of others are dropped."""
        self.shapes, self.groups = shapes, groups
        self.widths = exact_widths(groups, shapes)
        self._start: dict[str, int] = {}
        filled = dict.fromkeys(self.widths, 0)
        for name, shape in shapes.items():
            self._start[name] = filled[groups[name]]
            filled[groups[name]] += shape.numel()
        self._values = {group: torch.zeros(n, width, device=device) for group, width in self.widths.items()}

    def outer(self, name: str, delta: Tensor, x: Tensor, rows: slice) -> None:
        raise AssertionError("unreachable")

    def matrix(self, name: str, gradients: Tensor, rows: slice) -> None:
        if name in self.shapes:
            self._place(name)[rows] += gradients.flatten(1)

    def lookup(self, name: str, size: int, ids: Tensor, delta: Tensor, row: int) -> None:
        self._place(name)[row].view(self.shapes[name]).index_add_(0, ids, delta)

    def vector(self, name: str, gradients: Tensor) -> None:
        if name in self.shapes:
            self._place(name).add_(gradients)

    def result(self) -> dict[str, Tensor]:
        return self._values

    def _place(self, name: str) -> Tensor:
        start = self._start[name]
        return self._values[self.groups[name]][:, start : start + self.shapes[name].numel()]


def exact_widths(groups: Mapping[str, str], shapes: Mapping[str, torch.Size]) -> dict[str, int]:
    """Numbers per group where gradients are stored themselves."""
    widths = dict.fromkeys((groups[name] for name in shapes), 0)
    for name, shape in shapes.items():
        widths[groups[name]] += shape.numel()
    return widths


def by_tokens_is_cheaper(tokens: int, n_out: int, n_in: int, sizes: Sequence[int]) -> bool:
    """Whether sum_t delta_t (x) x_t is sketched to `sizes`, and its norm found, sooner without the (out, in) matrix.

    Without it: two T x T products for the norm, then two count sketches and Fourier transforms per token and sketch.
    With it: one product, one pass for the norm and one for each sketch. In nanoseconds of one CPU thread, fitted to 24
    measured cases (180 and 1,024 tokens, k of 256 to 4,096, matrices of 256 x 256 to 1,376 x 512), right to a third.
    """
    norm = 10 * tokens + 0.02 * tokens * (n_out + n_in)
    without = tokens * (norm + 1.9 * len(sizes) * (n_out + n_in) + 9 * sum(sizes))
    return without < n_out * n_in * (0.018 * tokens + 1.6 * (1 + len(sizes)))


def squared_norms(delta: Tensor, x: Tensor) -> Tensor:
    """||sum_t delta_t (x) x_t||_F^2 = sum_ts <delta_t, delta_s><x_t, x_s>, (n,) float64."""
    gram = torch.bmm(delta, delta.transpose(1, 2)) * torch.bmm(x, x.transpose(1, 2))
    return gram.sum(dim=(1, 2), dtype=torch.float64)


def lookup_squared_norm(ids: Tensor, delta: Tensor) -> Tensor:
    """||sum_t onehot(ids_t) (x) delta_t||_F^2, float64; ids: (T,), delta: (T, width)."""
    distinct, which = torch.unique(ids, return_inverse=True)
    sums = delta.new_zeros(len(distinct), delta.shape[-1]).index_add_(0, which, delta)
    return sums.square().sum(dtype=torch.float64)
