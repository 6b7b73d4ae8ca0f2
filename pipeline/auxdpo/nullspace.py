"""AuxDPO's null-space constraint over the whole dataset, on cached sketches of the reference's gradients.

A has one column g_j per side of a pair, 2n in all: the gradient of that response's summed log-prob at the reference.
The offsets delta, in reward units, should satisfy A delta = 0 (arXiv 2510.20413), so that they explain only what the
policy can't. A response that several pairs share has one offset and one row here, and counts as often as it occurs.
S A, the sketches, stands for A: ||S A delta||^2 is unbiased for ||A delta||^2 with a relative deviation of about
sqrt(2/k), for offsets that were not fitted to S. Fitted ones look better on S than they are; the audit sketch, which
nobody fits to, tells the truth.

Notation: m distinct responses; K numbers per sketch, all groups together.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from cache import CacheIncomplete, Keys, KeySet, Sketches, key_bytes, locate
from cache.key_set import key_array
from cache.sketches import AUDIT
from pipeline.auxdpo.requirements import require_rank
from pipeline.forward.logps import ResponseLogps, Tokens, collate
from pipeline.progress import Advance

CHUNK_BYTES = 256 << 20  # of sketches in memory, or on the device, at a time
DENSE = 4096  # up to this many rows or columns the singular vectors come from a full decomposition
ITERATIONS, OVERSAMPLING = 8, 2  # of the subspace iteration above it
NEGLIGIBLE = 1e-6  # singular values below this share of the largest are rounding

SumOverRanks = Callable[[Tensor], Tensor]  # adds a tensor over all ranks and returns the sum


def _of_one_rank(values: Tensor) -> Tensor:
    return values


class SketchedGradients:
    """S A as a (m, K) array, usually memory-mapped, with the weight of each response and its audit sketch.

    sketches: (m, K), audit: (m, audit width), float32. counts: (m,), in how many sides of pairs each response occurs;
    weights: counts / sum(counts), which makes the 1/2n of the penalty. device: where products are taken, a chunk of
    rows at a time.
    """

    def __init__(self, sketches: Tensor, audit: Tensor, counts: Tensor, device: torch.device | str = "cpu") -> None:
        assert len(sketches) == len(audit) == len(counts)
        self.sketches, self.device = sketches, torch.device(device)
        self.audit = audit.to(device)
        self.weights = (counts.double() / counts.sum()).float().to(device)

    def __len__(self) -> int:
        return len(self.sketches)

    def penalty(self, coefficients: Tensor, sum_over_ranks: SumOverRanks = _of_one_rank) -> tuple[Tensor, Tensor]:
        """||sum_j c_j S g_j||^2 and its gradient by c. coefficients: c, (m,) on the device, weights * delta say.

        sum_over_ranks: where every rank holds some of the responses; the gradient is by this rank's coefficients.
        """
        total = sum_over_ranks(self.combine(coefficients))
        return total.square().sum(), 2 * self.products(total)

    def combine(self, coefficients: Tensor) -> Tensor:
        """sum_j coefficients_j S g_j; (m,) or (m, q) to (K,) or (q, K)."""
        width = self.sketches.shape[1]
        total = torch.zeros(*coefficients.shape[1:], width, device=self.device)
        for rows, part in self.chunks():
            total += torch.tensordot(coefficients[rows].float(), part, dims=([0], [0]))
        return total

    def products(self, vectors: Tensor) -> Tensor:
        """<S g_j, vector> for every j; (K,) or (K, q) to (m,) or (m, q)."""
        nothing = torch.zeros(0, *vectors.shape[1:], device=self.device)
        return torch.cat([nothing, *(part @ vectors for _, part in self.chunks())])

    def select(self, rows: Tensor) -> "SketchedGradients":
        """Those of some responses alone, as if there were no others; rows: (n,)."""
        rows = rows.cpu()
        audit = self.audit[rows.to(self.audit.device)]
        return SketchedGradients(self.sketches[rows], audit, torch.ones(len(rows)), self.device)

    def chunks(self) -> Any:
        """(slice of rows, their sketches on the device), in order."""
        step = max(1, CHUNK_BYTES // (4 * self.sketches.shape[1]))
        for start in range(0, len(self), step):
            rows = slice(start, min(start + step, len(self)))
            yield rows, self.sketches[rows].to(self.device)


def load_gradients(
    sketches: Sketches, keys: Keys, counts: Tensor, file: Path, device: torch.device | str = "cpu"
) -> SketchedGradients:
    """Stream the sketches of `keys`, distinct and in the order of the offsets, into the float32 file `file`.

    Takes 4 m K bytes of disk and a few row groups of memory. Raises CacheIncomplete for keys without a sketch.
    """
    asked = key_array(keys)
    groups = list(sketches.identity.widths)
    width = sum(sketches.identity.widths.values())
    if not groups:
        raise CacheIncomplete(
            f"{sketches.path} holds no sketches (sketch.mode none). Set it and run `dvc repro sketch`."
        )
    shape = (len(asked), width)
    mapped = np.memmap(file, np.float32, "w+", shape=shape) if len(asked) else np.zeros(shape, np.float32)
    audit = np.zeros((len(asked), sketches.identity.audit or 0), np.float32)
    seen = np.zeros(len(asked), np.bool_)
    for found, values in sketches.batches([*groups, AUDIT]):
        where = locate(found, asked)
        wanted = where >= 0
        mapped[where[wanted]] = np.concatenate([values[group][wanted] for group in groups], axis=1)
        audit[where[wanted]] = values[AUDIT][wanted]
        seen[where[wanted]] = True
    if not seen.all():
        absent = KeySet(asked[~seen])
        raise CacheIncomplete(sketches.incomplete(len(absent), key_bytes(absent.array[:3]), len(asked)))
    return SketchedGradients(torch.from_numpy(mapped), torch.from_numpy(audit), counts, device)


class Projection:
    """Offsets made orthogonal to the leading right singular vectors of the weighted S A.

    basis: (m, r) with orthonormal columns. r may be smaller than the rank asked for: directions that the sketch does
    not see need no constraint.
    """

    def __init__(self, gradients: SketchedGradients, rank: int) -> None:
        """singular_values: (r,), descending. Raises RequestError as `require_rank`."""
        m, width = gradients.sketches.shape
        require_rank(rank, responses=m, width=width)
        self.basis, self.singular_values = _leading(gradients, rank)

    @classmethod
    def onto_complement(cls, basis: Tensor) -> Self:
        """The null space beside the span of a basis found before; singular values are not known."""
        made = cls.__new__(cls)
        made.basis = basis
        return made

    def __call__(self, delta: Tensor) -> Tensor:
        """delta - V V^T delta, (m,)."""
        basis = self.basis.to(delta.dtype)
        return delta - basis @ (basis.T @ delta)


def _leading(gradients: SketchedGradients, rank: int) -> tuple[Tensor, Tensor]:
    """(m, r) right singular vectors of the K x m matrix with columns weights_j S g_j, and their singular values."""
    m, width = gradients.sketches.shape
    weights = gradients.weights[:, None]
    if m <= min(width, DENSE):
        values, vectors = torch.linalg.eigh(_gram(gradients))
        return _truncate(vectors.flip(1).float(), values.clamp(min=0).sqrt().flip(0).float(), rank)
    if width <= DENSE:
        scaled = ((weights[rows] * part).double() for rows, part in gradients.chunks())
        moment = sum((part.T @ part for part in scaled), torch.zeros((), dtype=torch.float64, device=gradients.device))
        left = torch.linalg.eigh(moment).eigenvectors.flip(1)[:, :rank].float()
    else:
        left = _iterate(gradients, weights, min(OVERSAMPLING * rank, m, width))
    right, values, _ = torch.linalg.svd(weights * gradients.products(left), full_matrices=False)
    return _truncate(right, values, rank)


def _gram(gradients: SketchedGradients) -> Tensor:
    """weights_i weights_j <S g_i, S g_j>, (m, m) float64: in float32 the square would hide small singular values."""
    weights = gradients.weights[:, None].double()
    gram = torch.zeros(len(gradients), len(gradients), dtype=torch.float64, device=gradients.device)
    for rows, part in gradients.chunks():
        for others, other in gradients.chunks():
            gram[rows, others] = part.double() @ other.double().T
    return weights * gram * weights.T


def _iterate(gradients: SketchedGradients, weights: Tensor, size: int) -> Tensor:
    """An orthonormal basis, (K, size), near the leading left singular vectors: block power iteration."""
    draw = torch.Generator().manual_seed(0)
    start = torch.randn(gradients.sketches.shape[1], size, generator=draw).to(gradients.device)
    left: Tensor = torch.linalg.qr(start).Q
    for _ in range(ITERATIONS):
        right = torch.linalg.qr(weights * gradients.products(left)).Q
        left = torch.linalg.qr(gradients.combine(weights * right).T).Q
    return left


def _truncate(vectors: Tensor, values: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    rank = min(rank, int((values > NEGLIGIBLE * values[0]).sum()))
    return vectors[:, :rank].contiguous(), values[:rank]


def exact_penalty(
    logps: ResponseLogps,
    sequences: Sequence[tuple[Tokens, Tokens]],
    coefficients: Tensor,
    batch_size: int = 8,
    advance: Advance | None = None,
) -> float:
    """||sum_j coefficients_j g_j||^2 by ordinary backward passes over all sequences; nothing is sketched.

    logps: of the reference, in which the parameters in question require gradient; theirs are reset. coefficients: (m,),
    for the penalty's true value weights * delta. advance: told of sequences and tokens that are done.
    """
    logps.zero_grad()
    device = next(logps.parameters()).device
    for start in range(0, len(sequences), batch_size):
        part = sequences[start : start + batch_size]
        batch = collate(part).to(device)
        each = coefficients[start : start + batch_size].to(device)[batch.rows]
        (logps(*batch) * each.float()).sum().backward()
        if advance is not None:
            advance(len(part), sum(len(prompt) + len(response) for prompt, response in part))
    squared = sum(p.grad.double().square().sum().item() for p in logps.parameters() if p.grad is not None)
    logps.zero_grad()
    return squared
