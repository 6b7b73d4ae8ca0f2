"""Over seeds, ||S A delta||^2 is unbiased and spreads by sqrt(2/k), for any delta that was not fitted to the sketch."""

import pytest
import torch

from pipeline.sketches.groups import find_trained
from pipeline.sketches.hashes import SKETCH, hashes
from pipeline.sketches.sums import TensorSketchSums
from pipeline.trainable.selection import select_trainable
from tests.pipeline.forward.test_logps import tiny_model
from tests.pipeline.sketches.slow_sketches import exact_gradients

pytestmark = pytest.mark.slow

SEEDS, RESPONSES = 200, 24
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def columns():
    """The columns of A by parameter, (RESPONSES, *shape), over the last block; half of them nearly repeat others."""
    draw = torch.Generator().manual_seed(2)
    model = select_trainable(tiny_model("llama"), "last_block")
    rows = [[torch.randint(3, 61, (n,), generator=draw).tolist() for n in (4, 20)] for _ in range(RESPONSES // 2)]
    rows += [[prompt, [*response[:-1], 2]] for prompt, response in rows]
    found = [exact_gradients(model, *row) for row in rows]
    return find_trained(model), {name: torch.stack([row[name] for row in found]) for name in found[0]}


def offsets(columns):
    """(2, RESPONSES): a random delta, and one near the null space, of the four smallest singular values."""
    flat = torch.cat([values.flatten(1) for values in columns.values()], dim=1).double()
    values, vectors = torch.linalg.eigh(flat @ flat.T)
    draw = torch.Generator().manual_seed(0)
    near = vectors[:, :4] @ torch.randn(4, generator=draw, dtype=torch.float64)
    assert near @ flat @ (near @ flat) < 0.1 * near.square().sum() * values.mean()
    return torch.stack([torch.randn(RESPONSES, generator=draw), near.float()])


@pytest.mark.parametrize("k", [64, 256])
def test_the_squared_norm_is_unbiased_and_spreads_as_a_dense_gaussian_sketch_would(columns, k):
    layout, gradients = columns
    delta = offsets(gradients)
    combined = {name: torch.einsum("dj,j...->d...", delta, values) for name, values in gradients.items()}
    for name, value in combined.items():  # and one without any cancellation, where a sketch without signs would show
        combined[name] = torch.cat([value, value[:1].abs()])
    truth = sum(value.double().flatten(1).square().sum(dim=1) for value in combined.values())
    ratios = []
    for seed in range(SEEDS):
        sums = TensorSketchSums(layout.groups, k, hashes(k, seed=seed, purpose=SKETCH, device=CPU), 3, CPU)
        for name, value in combined.items():
            if value.dim() == 3:
                sums.matrix(name, value, slice(0, 3))
            else:
                sums.vector(name, value)
        ratios.append(sums.result()["block_001"].double().square().sum(dim=1) / truth)
    found = torch.stack(ratios)  # (SEEDS, 3)
    bias, spread = found.mean(dim=0) - 1, found.std(dim=0)
    assert (bias.abs() < 4 * spread / SEEDS**0.5).all(), bias  # t-test, false alarms of 1 in 10,000
    expected = (2 / k) ** 0.5
    assert (spread[:2] < 1.3 * expected).all() and (spread[:2] > expected / 1.3).all(), spread / expected
