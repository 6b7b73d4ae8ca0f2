"""`refcache sketch-report`: its figures against gradients whose spectrum is known, and what it warns of and refuses."""

import json
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner

from cache import SketchIdentity, publish_reference
from cache.sketches import canonical_json, sketches_table
from pipeline.errors import RequestError
from pipeline.upkeep import sketch_report
from pipeline.upkeep.sketch_report import report_sketches
from pipeline.upkeep.sketch_spectrum import (
    decompose,
    effective_dimension,
    fitted_ratio,
    numbers_for,
    penalty_scale,
    predicted_ratio,
    true_dimension,
)
from stages.__main__ import main
from tests.cache.test_sketches import IDENTITY, keys

N, D = 200, 900


def gradients(seed=0, n=N, decay=0.7):
    """n x D, rows of gradients whose directions decay as a power law."""
    return np.random.default_rng(seed).normal(size=(n, D)) * np.arange(1.0, D + 1) ** -decay


def gaussian(k, seed):
    """D x k, a dense sketch: E S S^T = I."""
    return np.random.default_rng([9, seed]).normal(size=(D, k)) / k**0.5


def write(folder, columns, k, *, groups=("block_000", "head"), audit=64, mode="tensorsketch"):
    """A publication of sketched `columns`, its groups the two halves of the parameters."""
    halves = [np.zeros_like(columns), np.zeros_like(columns)]
    halves[0][:, : D // 20], halves[1][:, D // 20 :] = columns[:, : D // 20], columns[:, D // 20 :]
    if mode == "exact":
        values = {groups[0]: columns}
    else:
        values = {g: half @ gaussian(k, i) for i, (g, half) in enumerate(zip(groups, halves, strict=True))}
    widths = {group: numbers.shape[1] for group, numbers in values.items()}
    values = {g: v.astype(np.float32) for g, v in {**values, "audit": columns @ gaussian(audit, 7)}.items()}
    own = {"k": None if mode == "exact" else k, "audit": audit, "groups": canonical_json(widths), "mode": mode}
    identity = replace(IDENTITY, **own)
    norms = np.linalg.norm(columns, axis=1).astype(np.float32)
    publish_reference(folder, sketches_table(keys(0, len(columns)), norms, values), identity)
    return folder


@pytest.mark.parametrize(("k", "share"), [(64, 0.15), (256, 0.15), (1024, 0.15)])
def test_the_effective_dimension_of_the_gradients_is_found_from_a_sketch_that_has_less(k, share):
    columns = gradients()
    truth = np.linalg.eigvalsh(columns @ columns.T)[::-1]
    sketched = columns @ gaussian(k, 1)
    mu = float(truth[int(share * k) if k < 256 else 40])
    found = decompose(sketched @ sketched.T, columns @ gaussian(256, 2))
    wanted, own = effective_dimension(truth, mu), effective_dimension(found.values, mu)
    assert own < wanted - 0.5
    assert true_dimension(found.values, k, mu) == pytest.approx(wanted, rel=0.03)


def test_a_dimension_beyond_the_sketch_is_not_made_up():
    columns = gradients()
    sketched = columns @ gaussian(48, 1)
    spectrum = decompose(sketched @ sketched.T, columns @ gaussian(256, 2))
    mu = float(np.linalg.eigvalsh(columns @ columns.T)[-120])
    assert true_dimension(spectrum.values, 48, mu) is None


@pytest.mark.parametrize("k", [64, 256])
def test_offsets_fitted_to_a_sketch_see_the_predicted_share_of_their_penalty(k):
    """Against the true gradients, with offsets actually fitted."""
    columns = gradients()
    sketched, mu = columns @ gaussian(k, 1), float(np.linalg.eigvalsh(columns @ columns.T)[-20])
    gram = sketched @ sketched.T
    target = np.random.default_rng(3).normal(size=(N, 400))
    delta = np.linalg.solve(np.eye(N) + gram / mu, target)
    truth = np.square(columns.T @ delta).sum() / np.square(sketched.T @ delta).sum()
    spectrum = decompose(gram.copy(), columns @ gaussian(2000, 2))
    assert 1 / truth == pytest.approx(fitted_ratio(spectrum, mu), rel=0.1)
    assert 1 / truth == pytest.approx(predicted_ratio(effective_dimension(spectrum.values, mu), k), rel=0.15)
    assert 1 / truth < 0.9


def test_enough_numbers_are_enough_by_the_same_formula():
    assert predicted_ratio(50.0, numbers_for(50.0, 0.88)) == pytest.approx(0.88)
    assert numbers_for(50.0, 0.88) == pytest.approx(16 * 50, rel=0.02)


def test_the_scale_of_the_penalty_is_where_its_curvature_equals_the_ridges():
    """weight ||A delta / n||^2 along a direction of eigenvalue mu bends as much as (ridge + 1/4) mean(delta^2)."""
    n, weight, ridge = 7, 3.0, 0.5
    assert weight * penalty_scale(n, weight, ridge) / n**2 == pytest.approx((ridge + 0.25) / n)


def test_the_report_is_that_of_the_rows_however_they_are_read(tmp_path, monkeypatch):
    columns = gradients()
    write(tmp_path / "sketches", columns, 128)
    found = report_sketches(tmp_path / "sketches", absolute=[1.0, 30.0], ridge=0.1)
    exact = np.square(columns).sum()
    truth = np.linalg.eigvalsh(columns @ columns.T)[::-1]
    assert (found["rows"], found["rows_used"], found["seed"], found["numbers"]) == (N, N, None, 256)
    assert found["spectrum"]["energy"] == pytest.approx(exact / N, rel=1e-5)
    assert found["spectrum"]["stable_rank"] == pytest.approx(exact / truth[0], rel=0.25)
    for row in found["spectrum"]["tail"][:6]:
        assert row["audit"] == pytest.approx(truth[row["rank"] :].sum() / exact, abs=0.08)
    shares = [group["energy"] for group in found["groups"].values()]
    assert sum(shares) == pytest.approx(1) and shares[0] > shares[1]
    assert found["effective_numbers"] == pytest.approx(128 / sum(share**2 for share in shares))
    assert [p["null_weight_absolute"] for p in found["penalties"]] == [1.0, 30.0]
    for p in found["penalties"]:  # mu where null_weight is in m / (4 mean ||g||^2)
        assert p["mu"] == pytest.approx((1 + 4 * 0.1) * exact / N / p["null_weight"], rel=1e-5)
    assert json.loads(json.dumps(found)) == found
    monkeypatch.setattr(sketch_report, "SLICE_BYTES", 8 * N * 30)  # 30 numbers at a time, the last slice shorter
    again = report_sketches(tmp_path / "sketches", absolute=[1.0, 30.0], ridge=0.1)
    np.testing.assert_allclose(again["spectrum"]["leading"], found["spectrum"]["leading"], rtol=1e-9)
    assert again["errors"]["sketch"] == pytest.approx(found["errors"]["sketch"], rel=1e-9)


@pytest.mark.parametrize("scale", [1e-3, 50.0])
def test_the_suggestion_for_a_null_weight_is_the_same_for_gradients_in_any_unit(tmp_path, scale):
    plain, other = (
        report_sketches(write(tmp_path / name, factor * gradients(), 128), null_weights=[1.0])
        for name, factor in (("plain", 1.0), ("other", scale))
    )
    assert other["suggested"] == plain["suggested"]
    (ours,), (theirs,) = other["penalties"], plain["penalties"]
    for name in ("null_weight", "dimension", "dimension_of_sketch", "measured_ratio"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-2), name
    assert ours["null_weight_absolute"] == pytest.approx(theirs["null_weight_absolute"] / scale**2, rel=1e-3)


def test_errors_are_measured_against_the_exact_norms(tmp_path):
    write(tmp_path / "sketches", gradients(), 128)
    errors = report_sketches(tmp_path / "sketches", absolute=[1.0])["errors"]
    assert errors["audit"]["predicted"] == pytest.approx((2 / 64) ** 0.5)
    for error in errors.values():
        assert error["measured"] == pytest.approx(error["predicted"], rel=0.35)
        assert abs(error["mean"]) < error["predicted"] and error["worst"] > error["measured"]
    write(tmp_path / "exact", gradients(), 0, groups=("lora",), mode="exact")
    exact = report_sketches(tmp_path / "exact", absolute=[1.0])
    assert exact["errors"]["sketch"]["predicted"] == 0 and exact["errors"]["sketch"]["measured"] < 1e-3
    assert exact["effective_numbers"] is None


def test_a_sketch_that_is_too_small_says_so_and_one_that_is_as_large_as_suggested_does_not(tmp_path):
    columns = gradients(decay=1.5) * 30
    truth = effective_dimension(np.linalg.eigvalsh(columns @ columns.T), penalty_scale(N, 1.0, 0.0))
    small = report_sketches(write(tmp_path / "small", columns, 32), absolute=[1.0])
    assert small["penalties"][0]["measured_ratio"] < 0.5 and "too small" in small["warnings"][0]
    k = small["suggested"]["k"]
    assert f"Set sketch.k to {k:,}" in small["warnings"][0] and "dvc repro sketch" in small["warnings"][0]
    large = report_sketches(write(tmp_path / "large", columns, k), absolute=[1.0])
    assert large["warnings"] == [] and large["suggested"]["k"] <= k
    assert large["penalties"][0]["dimension"] == pytest.approx(truth, rel=0.1)
    assert large["penalties"][0]["measured_ratio"] > 0.7
    assert 1 <= large["suggested"]["rank"] <= large["effective_numbers"] / 4


def test_above_the_limit_a_seeded_sample_is_used_and_said_to_be(tmp_path):
    folder = write(tmp_path / "sketches", gradients(), 64)
    first, again, other = (report_sketches(folder, absolute=[1.0], rows=50, seed=seed) for seed in (0, 0, 3))
    assert first == again and first["spectrum"] != other["spectrum"]
    assert (first["rows"], first["rows_used"], first["seed"]) == (N, 50, 0)
    assert first["spectrum"]["energy"] == pytest.approx(np.square(gradients()).sum() / N, rel=0.2)
    output = CliRunner().invoke(main, ["sketch-report", str(folder), "--rows", "50"]).output
    assert "50 of them, seed 0" in output
    with pytest.raises(RequestError, match="8,192"):
        report_sketches(folder, absolute=[1.0], rows=9000)


def test_gradients_that_are_all_zero_are_refused(tmp_path):
    with pytest.raises(RequestError, match=r"zero.*`trainable`"):
        report_sketches(write(tmp_path / "zero", 0 * gradients(), 32), absolute=[1.0])


def test_an_empty_publication_is_refused_with_what_to_run(tmp_path):
    none = SketchIdentity(mode="none")
    publish_reference(tmp_path, none.kind.schema.empty_table(), none)
    result = CliRunner().invoke(main, ["sketch-report", str(tmp_path)])
    assert result.exit_code == 2 and "dvc repro sketch" in result.stderr and "sketch.mode" in result.stderr


def test_the_command_prints_tables_and_writes_json(tmp_path):
    folder, out = write(tmp_path / "sketches", gradients(), 32), tmp_path / "results" / "report.json"
    result = CliRunner().invoke(main, ["sketch-report", str(folder), "--null-weight", "300", "--out", str(out)])
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    for part in ("effective dimension", "stable rank", "block_000", "by the audit", "Suggested for null_weight 300 ("):
        assert part in result.output
    assert found["warnings"] and all(f"Warning: {warning}" in result.output for warning in found["warnings"])
