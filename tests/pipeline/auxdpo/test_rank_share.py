"""AuxDPO's offsets on several ranks, and how published sketches reach them. The ranks are threads."""

import threading

import numpy as np
import polars as pl
import pytest
import torch

from cache import open_sketches, publish_reference
from pipeline.auxdpo.nullspace import Projection, load_gradients
from pipeline.auxdpo.rank_share import centre, open_offsets, planned_bytes, rank_slice
from pipeline.errors import RequestError
from tests.cache.test_sketches import IDENTITY, keys, make_rows
from tests.pipeline.auxdpo.test_nullspace import draw
from tests.pipeline.auxdpo.test_offsets import PROMPTS, SIDES, M, centred, logps, make, params, sketched


class Threads:
    """Ranks as threads that meet in sum_over_ranks."""

    def __init__(self, ranks: int) -> None:
        self.barrier, self.parts = threading.Barrier(ranks), [torch.empty(0)] * ranks

    def adder(self, rank: int):
        def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
            self.parts[rank] = values.clone()
            self.barrier.wait()
            total = sum(self.parts[1:], self.parts[0].clone())
            self.barrier.wait()
            return values.copy_(total)

        return sum_over_ranks

    def run(self, work) -> list:
        results: list = [None] * len(self.parts)

        def of_rank(rank: int) -> None:
            results[rank] = work(rank)

        threads = [threading.Thread(target=of_rank, args=(rank,)) for rank in range(len(results))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


@pytest.mark.parametrize("constraint", ["penalty", "projection", "batch"])
def test_any_number_of_ranks_makes_the_same_steps_and_tells_the_same(constraint):
    batches = [np.array([0, 3, 5, 6]), np.array([1, 2, 4, 7]), np.array([0, 1, 6, 7])]
    fields = {"constraint": constraint, "null_weight_absolute": 10.0, "offset_learning_rate": 0.05, "centred": True}

    def train(rank: int, ranks: int, sum_over_ranks):
        projection = Projection(sketched(), 4) if constraint == "projection" else None
        rows = rank_slice(rank, ranks, M)
        offsets = make(rows=rows, sum_over_ranks=sum_over_ranks, projection=projection, **fields)
        told = []
        for batch in batches:
            mine = np.array_split(batch, ranks)[rank]
            offsets.losses(logps(mine), mine, batch)
            told.append(offsets.step(batch, 1.0))
        return offsets.values, told, offsets.summary()

    values, told, summary = train(0, 1, lambda x: x)
    for ranks in (2, 3):
        threads = Threads(ranks)
        found = threads.run(lambda rank, ranks=ranks, threads=threads: train(rank, ranks, threads.adder(rank)))
        assert all(torch.equal(one[0], found[0][0]) and one[1:] == found[0][1:] for one in found)
        torch.testing.assert_close(found[0][0], values, rtol=1e-4, atol=1e-6)
        for ours, theirs in zip([*found[0][1], found[0][2]], [*told, summary], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("ranks", [1, 3, 16])
def test_shares_are_all_responses_once(ranks):
    rows = [rank_slice(rank, ranks, 10) for rank in range(ranks)]
    assert [n for part in rows for n in range(10)[part]] == list(range(10))


class OneOf:
    device = torch.device("cpu")

    def __init__(self, rank: int, ranks: int, sum_over_ranks) -> None:
        self.rank, self.ranks, self.sum_over_ranks = rank, ranks, sum_over_ranks


@pytest.fixture
def published(tmp_path, monkeypatch) -> pl.DataFrame:
    """Four pairs whose responses are among the sketches that it publishes in `sketches`."""
    monkeypatch.setenv("REFCACHE_HOME", str(tmp_path / "home"))
    publish_reference(tmp_path / "sketches", make_rows(0, 40), IDENTITY)
    chosen, rejected = [keys(n, n + 1)[0] for n in (30, 7, 7, 3)], [keys(n, n + 1)[0] for n in (2, 11, 30, 12)]
    return pl.DataFrame({"chosen_key": chosen, "rejected_key": rejected})


@pytest.mark.parametrize("constraint", ["penalty", "projection"])
def test_the_planned_bytes_are_those_of_offsets_that_made_a_step(tmp_path, published, constraint):
    chosen = params(constraint=constraint, rank=3)
    groups = np.array([9, 4, 4, 9])
    offsets = open_offsets(tmp_path / "sketches", published, groups, chosen, OneOf(0, 1, lambda x: x))
    offsets.losses(logps(np.arange(4)), np.arange(4), np.arange(4))
    offsets.step(np.arange(4), 1.0)
    moments = offsets._adam.state[offsets.values]
    held = [part for part in vars(offsets).values() if isinstance(part, torch.Tensor)]
    held += [offsets.values.grad, moments["exp_avg"], moments["exp_avg_sq"], offsets._share.weights, offsets.keys]
    planned = planned_bytes(tmp_path / "sketches", published, chosen, 1)
    assert planned["offsets"] == sum(part.nbytes for part in held)
    assert planned["sketches (mapped)"] == offsets._share.sketches.nbytes + offsets._share.audit.nbytes
    if offsets._projection is not None:
        assert planned["projection"] == offsets._projection.basis.nbytes
    halves = planned_bytes(tmp_path / "sketches", published, chosen, 2)
    assert halves["sketches (mapped)"] == pytest.approx(planned["sketches (mapped)"] / 2, rel=0.2)


def test_nothing_is_planned_for_auxdpo_without_sketches(published):
    with pytest.raises(RequestError, match="--sketches"):
        planned_bytes(None, published, params(), 1)


def test_published_sketches_reach_the_offsets_of_their_responses(tmp_path, published):
    pairs = published
    chosen, rejected = (pairs[side].to_list() for side in ("chosen_key", "rejected_key"))
    distinct = sorted({*chosen, *rejected})
    whole = load_gradients(
        open_sketches(tmp_path / "sketches", expect=None), distinct, torch.ones(len(distinct)), tmp_path / "all"
    )
    threads = Threads(2)
    found = threads.run(
        lambda rank: open_offsets(
            tmp_path / "sketches",
            pairs,
            np.array([9, 4, 4, 9]),
            params(constraint="projection", rank=3),
            OneOf(rank, 2, threads.adder(rank)),
        )
    )
    delta = draw(len(distinct), seed=5)
    wanted = Projection(whole, 3)(delta)
    for offsets in found:
        offsets.values.copy_(delta)
        assert offsets.of(np.array([1]))[0] == delta[distinct.index(chosen[1])]
        assert offsets.of(np.array([2]))[1] == delta[distinct.index(rejected[2])]
        torch.testing.assert_close(offsets._projection(delta), wanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(found[0]._projection.basis, found[1]._projection.basis)
    penalties = threads.run(lambda rank: found[rank].summary()["penalty"])
    assert penalties == [pytest.approx(whole.penalty(whole.weights * delta)[0].item(), rel=1e-5)] * 2
    assert not list((tmp_path / "home/tmp").iterdir())  # nothing is left in the scratch folder


@pytest.mark.parametrize("weights", [torch.ones(M), torch.bincount(SIDES.flatten(), minlength=M)])
def test_centring_sketches_is_centring_offsets(weights):
    plain, gradients = sketched(), sketched()
    plain.weights = gradients.weights = weights / weights.sum()
    centre(gradients, PROMPTS)
    delta = draw(M, seed=4)
    wanted, _ = plain.penalty(plain.weights * centred(delta, plain.weights))
    assert gradients.penalty(gradients.weights * delta)[0].item() == pytest.approx(wanted.item(), rel=1e-4)
