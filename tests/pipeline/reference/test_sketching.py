"""The `sketch` stage: incremental, resumable, and nothing at all where no sketches are asked for."""

import itertools
import json
import multiprocessing
import shutil
import subprocess
import sys

import numpy as np
import polars as pl
import pytest

from cache import CacheMismatch, Journal, open_sketches, verify
from pipeline.data.tables import RESPONSES_SCHEMA, read_responses, write_table
from pipeline.errors import RequestError, RunFailed
from pipeline.params import SketchParams
from pipeline.reference import sketch_ranks, sketching
from pipeline.reference.sketching import length_batches, sketch_responses
from pipeline.sketches.sketcher import load_sketcher
from tests import ROOT
from tests.tiny import POSITIONS, write_model, write_pairs

pytestmark = pytest.mark.slow

PARAMS = SketchParams(mode="tensorsketch", k=32, audit=8, batch_tokens=64)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("sketching")
    write_model(root / "model")
    write_pairs(root / "pairs", 16)  # 48 responses, 36 of them in the training split
    return root


@pytest.fixture
def project(made, tmp_path, monkeypatch):
    monkeypatch.setenv("REFCACHE_HOME", str(tmp_path / "home"))
    shutil.copytree(made, tmp_path / "project")
    return tmp_path / "project"


def run(project, params=PARAMS, trainable="last_block", pairs="pairs"):
    return sketch_responses(
        pairs=project / pairs,
        model=project / "model",
        out=project / "sketches",
        metrics=project / "metrics.json",
        params=params,
        trainable=trainable,
    )


def training_rows(project):
    return read_responses(project / "pairs").filter(pl.col("split") == "train")


def keep(project, rows):
    """The folder pairs-less: the same responses without those that `rows` leaves out."""
    shutil.copytree(project / "pairs", project / "pairs-less")
    write_table(rows.to_arrow(), project / "pairs-less" / "responses.parquet", RESPONSES_SCHEMA)


def count_sketched(monkeypatch):
    """Keys of all rows that go through a backward from now on, batch by batch."""
    batches = []

    def counted(missing, batch_tokens):
        for batch in length_batches(missing, batch_tokens):
            batches.append(batch["response_key"].to_list())
            yield batch

    monkeypatch.setattr(sketching, "length_batches", counted)
    return batches


def test_every_training_response_gets_the_sketch_of_its_own_gradient(project):
    summary = run(project)
    rows = training_rows(project)
    assert (summary["responses"], summary["rows_sketched"], summary["rows_reused"]) == (36, 36, 0)
    assert json.loads((project / "metrics.json").read_text()) == summary
    sketches = open_sketches(project / "sketches", expect=None)
    assert sketches.keys() == set(rows["response_key"]) and verify(project / "sketches") == []
    row = rows.row(5, named=True)
    with load_sketcher(project / "model", PARAMS, "last_block") as sketcher:
        alone = sketcher([(row["prompt_ids"], row["response_ids"])])
    stored = sketches.rows([row["response_key"]]).row(0, named=True)
    for group, wanted in {**alone.values, "audit": alone.audit}.items():
        found = np.array(stored[group]) * stored[f"{group}_scale"]
        np.testing.assert_allclose(found, wanted[0].numpy(), rtol=1e-3, atol=1e-4 * wanted.abs().max().item())
    assert stored["grad_norm"] == pytest.approx(alone.grad_norm.item(), rel=1e-5)


def test_new_responses_alone_are_sketched_and_the_shards_are_those_of_one_run(project, monkeypatch):
    rows = read_responses(project / "pairs")
    new = training_rows(project)["response_key"].to_list()[::18]
    keep(project, rows.filter(~pl.col("response_key").is_in(new)))
    run(project, pairs="pairs-less")
    shutil.rmtree(project.parent / "home")  # what is published counts without the journal
    batches = count_sketched(monkeypatch)
    summary = run(project)
    assert sorted(key for batch in batches for key in batch) == sorted(new)
    assert (summary["rows_sketched"], summary["rows_reused"]) == (2, 34)
    assert run(project)["rows_sketched"] == 0 and len(batches) == len([b for b in batches if b])


def test_a_killed_run_resumes_without_sketching_a_finished_batch(project, monkeypatch):
    run(project)
    whole = {path.name for path in (project / "sketches").iterdir()}
    shutil.rmtree(project / "sketches")
    shutil.rmtree(project.parent / "home")
    batches = count_sketched(monkeypatch)
    plain, left = Journal.append, [3]

    def killed(journal, rows):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        plain(journal, rows)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Journal, "append", killed)
        run(project)
    finished = [key for batch in batches[:3] for key in batch]
    assert len(batches) == 4 and finished
    batches.clear()
    summary = run(project)
    assert not set(finished) & {key for batch in batches for key in batch}
    assert summary["rows_reused"] == len(finished)
    assert {path.name for path in (project / "sketches").iterdir()} == whole


def test_another_trainable_is_another_reference_and_its_rows_are_kept_apart(project):
    first = run(project)
    second = run(project, trainable="head")
    assert second["rows_sketched"] == 36 and first["reference_id"] != second["reference_id"]
    wanted = load_sketcher(project / "model", PARAMS, "last_block").identity(project / "model")
    with pytest.raises(CacheMismatch, match='trainable: found "head", expected "last_block"'):
        open_sketches(project / "sketches", expect=wanted)
    assert run(project)["rows_sketched"] == 0  # the journal has them


def test_batch_size_and_checkpointing_are_no_part_of_the_identity(project):
    run(project)
    other = PARAMS.model_copy(update={"batch_tokens": 9, "activation_checkpointing": True})
    assert run(project, other)["rows_sketched"] == 0
    assert run(project, PARAMS.model_copy(update={"seed": 1}))["rows_sketched"] == 36


def test_batches_keep_to_their_tokens_with_padding_longest_first(project):
    rows = training_rows(project)
    batches = list(length_batches(rows, 64))
    lengths = [batch["_length"].to_list() for batch in batches]
    assert all(max(batch) * len(batch) <= 64 for batch in lengths if len(batch) > 1)
    flat = [length for batch in lengths for length in batch]
    assert flat == sorted(flat, reverse=True) and len(flat) == 36
    assert [len(batch) for batch in length_batches(rows, 1)] == [1] * 36


def test_mode_none_writes_an_empty_publication_without_loading_torch(project):
    """It is a stage of every `dvc repro`, also of those that need no sketches."""
    code = (
        "import sys; from stages.__main__ import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as e: assert e.code == 0\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    options = {"--pairs": "pairs", "--model": "model", "--out": "sketches", "--metrics": "metrics.json"}
    words = [word for name, path in options.items() for word in (name, str(project / path))]
    command = [sys.executable, "-c", code, "sketch", *words, "--params", str(ROOT / "params.yaml")]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["sketch: none (sketch.mode is none)", "[]"]
    assert verify(project / "sketches") == [] and open_sketches(project / "sketches", expect=None).n_rows == 0
    run(project)
    run(project, SketchParams())
    assert open_sketches(project / "sketches", expect=None).identity.mode == "none"


def test_rows_that_the_model_cannot_take_are_refused_before_it_is_loaded(project):
    rows = read_responses(project / "pairs")
    long = rows.with_columns(
        response_ids=pl.when(pl.col("split") == "train").then(pl.lit([5] * POSITIONS)).otherwise("response_ids")
    ).cast({"response_ids": pl.List(pl.Int32)})
    keep(project, long)
    with pytest.raises(RequestError, match=f"{POSITIONS} positions"):
        run(project, pairs="pairs-less")


def test_pairs_without_training_responses_are_refused(project):
    keep(project, read_responses(project / "pairs").filter(pl.col("split") == "test"))
    with pytest.raises(RequestError, match="no training responses"):
        run(project, pairs="pairs-less")


# ranks ----------------------------------------------------------------------------------------------------------------


def read_all(folder):
    sketches = open_sketches(folder, expect=None)
    keys, values = zip(*sketches.batches([*sketches.identity.widths, "audit"]), strict=True)
    return np.concatenate(keys), {g: np.concatenate([batch[g] for batch in values]) for g in values[0]}


def kill_at(monkeypatch, moments):
    """SIGKILL a rank's process as it gets the batches that `moments` says: of (number of the call, its sequences)."""
    plain, calls = sketch_ranks._Rank.sketch, itertools.count(1)

    def then_killed(rank, sequences):
        if moments(next(calls), sequences):
            rank.process.kill()
        return plain(rank, sequences)

    monkeypatch.setattr(sketch_ranks._Rank, "sketch", then_killed)


def test_ranks_sketch_what_one_process_does_and_killed_ones_are_replaced(project, monkeypatch, capfd):
    run(project)
    keys, values = read_all(project / "sketches")
    shutil.rmtree(project / "sketches")
    shutil.rmtree(project.parent / "home")
    kill_at(monkeypatch, lambda call, sequences: call in (1, 4, 5))
    plain, appended = Journal.append, []
    monkeypatch.setattr(Journal, "append", lambda journal, rows: (appended.append(rows), plain(journal, rows)))
    assert run(project, PARAMS.model_copy(update={"ranks": 2}))["rows_sketched"] == 36
    assert capfd.readouterr().err.count("ended with code -9") == 3
    assert not multiprocessing.active_children()
    assert sum(rows.num_rows for rows in appended) == 36  # none twice
    found_keys, found = read_all(project / "sketches")
    assert (found_keys == keys).all()
    for group, wanted in values.items():
        np.testing.assert_allclose(found[group], wanted, rtol=1e-3, atol=1e-4 * np.abs(wanted).max())


def test_a_batch_that_ends_three_ranks_is_named_when_all_others_are_journalled(project, monkeypatch):
    first = next(length_batches(training_rows(project), PARAMS.batch_tokens))
    culprit = first["response_ids"][0].to_list()
    kill_at(monkeypatch, lambda call, sequences: culprit in [response for _, response in sequences])
    with pytest.raises(
        RunFailed, match=rf"1 batches ended 3 ranks.*the first of them {first['response_key'][0].hex()}"
    ):
        run(project, PARAMS.model_copy(update={"ranks": 2}))
    monkeypatch.undo()
    monkeypatch.setenv("REFCACHE_HOME", str(project.parent / "home"))
    assert run(project)["rows_sketched"] == len(first)


def test_what_a_rank_refuses_is_the_stages_refusal(project):
    rank = object.__new__(sketch_ranks._Rank)
    rank.pipe, theirs = multiprocessing.Pipe()
    sketch_ranks._work(theirs, sketch_ranks.RankJob(project / "absent", PARAMS, "last_block", False), 0)
    with pytest.raises(RequestError, match=r"absent does not exist\. Expected is a transformers folder"):
        rank.sketch([])
