"""AuxDPO's constraint on cached sketches: the penalty and its gradient, the projection, and what is refused."""

import numpy as np
import pytest
import torch

from cache import CacheIncomplete, open_sketches, publish_reference
from pipeline.auxdpo import nullspace
from pipeline.auxdpo.nullspace import Projection, SketchedGradients, exact_penalty, load_gradients
from pipeline.errors import RequestError
from pipeline.forward.logps import ResponseLogps
from pipeline.params import SketchParams
from pipeline.sketches.sketcher import Sketcher
from tests.cache.test_sketches import GROUPS, IDENTITY, keys, make_rows, make_values
from tests.pipeline.forward.test_logps import sequences, tiny_model


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(m=12, width=20, seed=0, counts=None):
    counts = torch.ones(m) if counts is None else counts
    return SketchedGradients(draw(m, width, seed=seed), draw(m, 8, seed=seed + 1), counts)


def weighted(gradients):
    """K x m, float64: columns weights_j S g_j."""
    return (gradients.weights[:, None] * gradients.sketches).T.double()


@pytest.fixture(params=[1, 1 << 28], ids=["row by row", "at once"], autouse=True)
def chunks(request, monkeypatch):
    monkeypatch.setattr(nullspace, "CHUNK_BYTES", request.param)


def test_the_penalty_on_exact_gradients_is_the_true_one():
    """||(1/2n) sum_j delta_j g_j||^2, against ordinary backward passes through the same model."""
    rows, delta = sequences(), draw(4)
    sketcher = Sketcher(tiny_model("llama"), SketchParams(mode="exact", audit=256), "last_block")
    with sketcher:
        found = sketcher(rows)
    counts = torch.tensor([1.0, 3.0, 2.0, 2.0])  # 8 sides of 4 pairs
    gradients = SketchedGradients(torch.cat(list(found.values.values()), dim=1), found.audit, counts)
    truth = exact_penalty(ResponseLogps(sketcher.model, 100), rows, counts / 8 * delta, batch_size=3)
    penalty, _ = gradients.penalty(gradients.weights * delta)
    assert penalty.item() == pytest.approx(truth, rel=1e-5)
    audited = ((gradients.weights * delta) @ gradients.audit).square().sum().item()
    assert audited == pytest.approx(truth, rel=4 * (2 / 256) ** 0.5)
    assert all(parameter.grad is None for parameter in sketcher.model.parameters())


def test_the_sketched_penalty_is_near_the_true_one():
    rows, delta = sequences(), draw(4)
    found = {}
    for mode in ("exact", "tensorsketch"):
        with Sketcher(tiny_model("llama"), SketchParams(mode=mode, k=1024), "last_block") as sketcher:
            sketched = sketcher(rows)
        columns = torch.cat(list(sketched.values.values()), dim=1)
        found[mode] = SketchedGradients(columns, sketched.audit, torch.ones(4)).penalty(delta / 4)[0].item()
    assert found["tensorsketch"] == pytest.approx(found["exact"], rel=4 * (2 / 1024) ** 0.5)


def test_the_gradient_of_the_penalty_is_that_of_its_formula():
    gradients, coefficients = make(), draw(12, seed=5)
    again = coefficients.double().requires_grad_()
    truth = (gradients.sketches.T.double() @ again).square().sum()
    truth.backward()
    penalty, slope = gradients.penalty(coefficients)
    assert penalty.item() == pytest.approx(truth.item(), rel=1e-5)
    torch.testing.assert_close(slope.double(), again.grad, rtol=1e-5, atol=1e-6)


def test_ranks_that_hold_some_of_the_responses_have_the_penalty_and_their_part_of_its_gradient():
    whole, coefficients = make(), draw(12, seed=5)
    first, second = (whole.select(torch.arange(12)[rows]) for rows in (slice(0, 5), slice(5, 12)))
    others = second.combine(coefficients[5:])
    penalty, slope = first.penalty(coefficients[:5], lambda total: total + others)
    truth, gradient = whole.penalty(coefficients)
    assert penalty.item() == pytest.approx(truth.item(), rel=1e-5)
    torch.testing.assert_close(slope, gradient[:5], rtol=1e-4, atol=1e-5)


def test_a_response_of_several_pairs_weighs_as_often_as_it_occurs():
    shared = make(m=3, counts=torch.tensor([2.0, 1.0, 1.0]))
    apart = SketchedGradients(shared.sketches[[0, 0, 1, 2]], shared.audit[[0, 0, 1, 2]], torch.ones(4))
    delta = draw(3, seed=2)
    found, _ = shared.penalty(shared.weights * delta)
    assert found.item() == pytest.approx(apart.penalty(apart.weights * delta[[0, 0, 1, 2]])[0].item(), rel=1e-5)


def test_offsets_fitted_to_the_sketch_are_told_by_the_audit():
    """Minimising ||delta - c||^2 + lambda ||S A delta||^2 makes the sketched penalty smaller than the truth."""
    m, d, k = 60, 400, 32
    columns, target = draw(m, d), draw(m, seed=9)
    sketched, audited = (columns @ draw(d, n, seed=n) / n**0.5 for n in (k, 256))
    gradients = SketchedGradients(sketched, audited, torch.ones(m))
    normal = torch.eye(m).double() + 1e4 * weighted(gradients).T @ weighted(gradients)
    delta = torch.linalg.solve(normal, target.double()).float()
    truth = ((delta / m) @ columns).square().sum().item()
    assert gradients.penalty(delta / m)[0].item() < 0.1 * truth
    assert ((delta / m) @ gradients.audit).square().sum().item() == pytest.approx(truth, rel=4 * (2 / 256) ** 0.5)


# projection -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dense", [4096, 0], ids=["decomposition", "iteration"])
@pytest.mark.parametrize(("m", "width"), [(12, 20), (30, 10)])
def test_the_projection_removes_the_leading_right_singular_vectors(monkeypatch, dense, m, width):
    monkeypatch.setattr(nullspace, "DENSE", dense)
    gradients = make(m=m, width=width, counts=torch.arange(1.0, m + 1))
    gradients.sketches *= 0.5 ** torch.arange(width)  # a spectrum with gaps, or singular vectors mean nothing
    projection = Projection(gradients, 4)
    _, values, right = torch.linalg.svd(weighted(gradients), full_matrices=False)
    torch.testing.assert_close(projection.singular_values.double(), values[:4], rtol=1e-4, atol=0)
    delta = draw(m, seed=4)
    wanted = delta.double() - right[:4].T @ (right[:4] @ delta.double())
    torch.testing.assert_close(projection(delta).double(), wanted, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(projection(projection(delta)), projection(delta), rtol=1e-4, atol=1e-5)
    assert (weighted(gradients) @ projection(delta).double()).norm() <= values[4] * delta.norm() * 1.001


def test_a_projection_that_leaves_only_zero_is_refused_with_the_reason():
    with pytest.raises(RequestError, match="leaves no offset but zero, since there are only 12 responses"):
        Projection(make(m=12, width=20), 12)
    with pytest.raises(RequestError, match=r"1\.\.20"):
        Projection(make(m=30, width=20), 21)


def test_directions_that_the_sketch_does_not_see_are_left_free():
    gradients = make(m=12, width=20)
    gradients.sketches[:] = draw(12, 3, seed=7) @ draw(3, 20, seed=8)  # rank 3
    projection = Projection(gradients, 8)
    assert projection.basis.shape == (12, 3)
    free, all_of_it = (gradients.penalty(delta)[0].item() for delta in (projection(draw(12)), draw(12)))
    assert free < 1e-10 * all_of_it


# from storage ---------------------------------------------------------------------------------------------------------


def test_sketches_are_streamed_into_the_order_of_the_offsets(tmp_path):
    publish_reference(tmp_path / "sketches", make_rows(0, 40), IDENTITY)
    sketches = open_sketches(tmp_path / "sketches", expect=IDENTITY)
    asked = keys(5, 25)
    gradients = load_gradients(sketches, asked, torch.ones(20), tmp_path / "rows.f32")
    wanted = np.concatenate([make_values(5, 25)[group] for group in GROUPS], axis=1)
    scale = np.abs(wanted).max(axis=1, keepdims=True)
    np.testing.assert_allclose(gradients.sketches.numpy() / scale, wanted / scale, atol=2.0**-11)
    assert gradients.audit.shape == (20, 4) and len(gradients) == 20
    assert (tmp_path / "rows.f32").stat().st_size == 4 * wanted.size
    with pytest.raises(CacheIncomplete, match="lacks 5 of the 20 responses"):
        load_gradients(sketches, keys(25, 45), torch.ones(20), tmp_path / "rows.f32")


def test_a_publication_without_sketches_is_refused(tmp_path):
    none = type(IDENTITY)(mode="none")
    publish_reference(tmp_path / "sketches", none.kind.schema.empty_table(), none)
    with pytest.raises(CacheIncomplete, match=r"holds no sketches.*sketch\.mode"):
        load_gradients(open_sketches(tmp_path / "sketches", expect=None), keys(0, 2), torch.ones(2), tmp_path / "f")
