"""AuxDPO's offsets on a rank: this rank's share of the published sketches, and what every rank must agree on."""

import dataclasses
import tempfile
from pathlib import Path
from typing import Protocol

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn

from cache import CacheMismatch, KeySet, Sketches, open_sketches
from cache.identity import require_identity
from cache.key_set import KeyArray, key_array
from pipeline.auxdpo.nullspace import Projection, SketchedGradients, load_gradients
from pipeline.auxdpo.offsets import Offsets, mean_squared_norm, prompt_shares, response_weights
from pipeline.auxdpo.requirements import pair_responses, require_responses
from pipeline.data.tables import PAIR_SIDES
from pipeline.errors import RequestError
from pipeline.params import AuxDPO
from pipeline.trainable.selection import adapter_digest
from pipeline.workspace import scratch_folder

RESIDENT_BYTES = 4 << 30  # of a rank's share that stay on its accelerator; more is copied there at every step


class Ranks(Protocol):
    """What offsets want of an engine."""

    rank: int
    ranks: int
    device: torch.device

    def sum_over_ranks(self, values: Tensor) -> Tensor: ...


def require_adapter(path: Path, model: nn.Module) -> None:
    """Raise RequestError unless the fresh LoRA in `model`, if any, is the one of the sketches in `path`."""
    found = open_sketches(path, expect=None).identity
    try:
        require_identity(path, found, dataclasses.replace(found, adapter_init=adapter_digest(model)))
    except CacheMismatch as error:
        raise RequestError(
            f"{error} (adapter_init: a LoRA's random start, which another version of peft or torch, or another "
            "sketch.dtype, may draw or round differently.)"
        ) from None


def open_offsets(path: Path, pairs: pl.DataFrame, groups: np.ndarray, params: AuxDPO, ranks: Ranks) -> Offsets:
    """Offsets of the responses of these pairs, zero, on this rank's device. Collective.

    pairs: a table of PAIR_SIDES, in the order in which batches number them; groups: a number for each one's prompt.
    Raises RequestError where no gradient is longer than zero and null_weight needs one.
    """
    sketches = open_sketches(path, expect=None)
    responses = pair_responses(pairs)
    sides = torch.from_numpy(np.stack([responses.positions(key_array(pairs[side])) for side in PAIR_SIDES], axis=1))
    prompts = torch.empty(len(responses), dtype=torch.int64)
    prompts[sides] = torch.from_numpy(np.unique(groups, return_inverse=True)[1])[:, None]
    rows = rank_slice(ranks.rank, ranks.ranks, len(responses))
    weights, projection = response_weights(sides, len(responses), params), None
    if params.constraint == "projection":
        projection = _common_projection(sketches, responses, weights, prompts, params, ranks)
    return Offsets(
        responses.array,
        prompts,
        sides,
        _load(sketches, responses.array[rows], ranks.device),
        rows,
        params,
        mean_square=_mean_square(sketches, responses, weights, params),
        sum_over_ranks=ranks.sum_over_ranks,
        projection=projection,
    )


def _mean_square(sketches: Sketches, responses: KeySet, weights: Tensor, params: AuxDPO) -> float:
    """Of the exact norms that are stored beside the sketches; the same on every rank."""
    norms = torch.tensor(sketches.rows(responses.array, ["grad_norm"])["grad_norm"].to_numpy())
    found = mean_squared_norm(norms, weights)
    if not found and params.constraint != "projection" and params.null_weight is not None:
        raise RequestError(
            f"{sketches.path}: the reference's gradients are zero for all {len(responses):,} training responses, so "
            f"null_weight {params.null_weight:g} has no unit and the constraint would hold nothing. Choose a "
            "`trainable` that the log-probs depend on and run `dvc repro sketch`."
        )
    return found


def planned_bytes(path: Path | None, pairs: pl.DataFrame, params: AuxDPO, ranks: int) -> dict[str, int]:
    """What `open_offsets` will hold on each of so many ranks, by part; the kernel may drop pages of mapped sketches.

    Raises RequestError without a path, and as open_sketches and require_responses.
    """
    if path is None:
        raise RequestError("auxdpo needs gradient sketches. Name their folder with --sketches.")
    sketches = open_sketches(path, expect=None)
    require_responses(sketches, pairs, params)
    responses, numbers = len(pair_responses(pairs)), sum(sketches.identity.widths.values())
    # Of a response: four float32 with Adam's, float64 gradient, two weights, two places, key; of a pair: its sides.
    parts = {"offsets": responses * (4 * 4 + 8 + 2 * 4 + 2 * 8 + 16) + len(pairs) * 16}
    if params.constraint == "projection":
        parts["projection"] = responses * params.rank * 4
    share = rank_slice(ranks - 1, ranks, responses)  # of the last rank, which has no fewer than others
    parts["sketches (mapped)"] = (share.stop - share.start) * (numbers + (sketches.identity.audit or 0)) * 4
    return parts


def rank_slice(rank: int, ranks: int, responses: int) -> slice:
    """The responses whose sketches `rank` holds: a run of them, about equally many on every rank."""
    return slice(responses * rank // ranks, responses * (rank + 1) // ranks)


def _load(sketches: Sketches, keys: KeyArray, device: torch.device, weights: Tensor | None = None) -> SketchedGradients:
    """From a file that is gone from its folder as soon as it is mapped. weights: of these keys; None: equal ones."""
    weights = torch.ones(len(keys)) if weights is None else weights
    with tempfile.TemporaryDirectory(dir=scratch_folder()) as folder:
        loaded = load_gradients(sketches, keys, weights, Path(folder) / "sketches.f32", device)
    if loaded.sketches.nbytes <= RESIDENT_BYTES:
        loaded.sketches = loaded.sketches.to(device)
    return loaded


def _common_projection(
    sketches: Sketches, responses: KeySet, weights: Tensor, prompts: Tensor, params: AuxDPO, ranks: Ranks
) -> Projection:
    """Found by rank 0 from all sketches; the others get its very numbers, since theirs may be rounded differently."""
    found = None
    if ranks.rank == 0:
        gradients = _load(sketches, responses.array, ranks.device, weights)
        if params.centred:
            centre(gradients, prompts)
        found = Projection(gradients, params.rank)
    columns = torch.tensor(float(found.basis.shape[1]) if found else 0.0, device=ranks.device)
    shape = (len(responses), int(ranks.sum_over_ranks(columns)))
    basis = found.basis.clone() if found else torch.zeros(shape, device=ranks.device)
    return Projection.onto_complement(ranks.sum_over_ranks(basis))


def centre(gradients: SketchedGradients, prompts: Tensor) -> None:
    """Subtract from each sketch its prompt's mean, by the gradients' weights; in place. prompts: (m,), below m.

    Offsets less their prompt's mean have the same sum_j w_j delta_j S g_j with these as with the sketches themselves,
    which is that of the offsets as they are. Holds one sketch for each prompt.
    """
    shares = prompt_shares(gradients.weights, prompts.to(gradients.device))
    means = torch.zeros(int(prompts.max()) + 1, gradients.sketches.shape[1], device=gradients.device)
    for rows, part in gradients.chunks():
        means.index_add_(0, prompts[rows].to(gradients.device), shares[rows, None] * part)
    for rows, part in gradients.chunks():
        gradients.sketches[rows] = (part - means[prompts[rows].to(gradients.device)]).to(gradients.sketches.device)
