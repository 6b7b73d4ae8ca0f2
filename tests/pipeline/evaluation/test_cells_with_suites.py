"""Policies judged by suites, with the real engine, against transformers' values and loops over questions."""

import json
import statistics
from types import SimpleNamespace

import polars as pl
import pyarrow as pa
import pytest

from cache import CacheIncomplete, logps_table, publish_reference
from pipeline.data.suites import INDEX, SUITE_ROWS_SCHEMA
from pipeline.data.tables import read_pairs, read_responses, write_table
from pipeline.engine import process
from pipeline.errors import RequestError
from pipeline.evaluation.cells import evaluate_cells
from pipeline.evaluation.questions import Cell
from pipeline.params import EvaluateParams, ScoreParams, SuiteParams
from pipeline.policies import engines
from pipeline.reference.identity import reference_identity
from pipeline.report.scores import scores_over_seeds
from tests.project import PARAMS, Project
from tests.tiny import plain_logps, write_model, write_pairs, write_reference_cache
from tests.tiny_reference import quick_engine

ENGINE = ScoreParams(enforce_eager=True, rows_per_call=16)
BETA = 0.5
SUITES = {
    "far": SuiteParams(files=["far.jsonl"], ties=True),
    "near": SuiteParams(files=["near.jsonl"], domain="in"),
}


@pytest.fixture(scope="module", autouse=True)
def quick():
    with quick_engine():
        yield


def write_rows(folder, ids):
    """rows.parquet of a prepared suite: one of `ids` a question, as long as there are any."""
    sources = read_pairs(folder)["source"].unique(maintain_order=True).to_list()
    rows = [{"source": s, "id": ids[n] if n < len(ids) else str(n)} for n, s in enumerate(sources)]
    write_table(pa.Table.from_pylist(rows, SUITE_ROWS_SCHEMA), folder / "rows.parquet", SUITE_ROWS_SCHEMA)


def sums_under(model, responses):
    """{response_key: token log-probs} from transformers."""
    return {
        key: plain_logps(model, prompt, response)
        for key, prompt, response in responses.select("response_key", "prompt_ids", "response_ids").iter_rows()
    }


def publish(out, folders, model, *, without=0):
    """A reference cache of transformers' values for what is in `folders`, but for the last `without` responses."""
    rows = pl.concat(map(read_responses, folders)).unique("response_key", maintain_order=True)
    rows = rows.head(len(rows) - without)
    table = logps_table(
        response_keys=rows["response_key"].to_list(),
        prompt_keys=rows["prompt_key"].to_list(),
        n_prompt_tokens=rows["prompt_ids"].list.len().to_list(),
        token_ids=rows["response_ids"].to_list(),
        token_logps=list(sums_under(model, rows).values()),
    )
    publish_reference(out, table, reference_identity(model, dtype="float32", quantization=None))
    return out


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Pairs, a suite of other questions, one of the very same questions, and the reference's log-probs of them all."""
    root = tmp_path_factory.mktemp("given")
    found = SimpleNamespace(root=root, model=write_model(root / "model"), suites=root / "suites")
    found.pairs = write_pairs(root / "pairs", 10, test_share=0.6)
    found.far = write_pairs(found.suites / "far", 9, responses=4, seed=5)
    found.near = write_pairs(found.suites / "near", 10, test_share=0.6)
    write_rows(found.far, ["ref:0", "tied:0"])
    write_rows(found.near, [])
    (found.suites / INDEX).write_text(json.dumps(list(SUITES)))
    found.reference = write_reference_cache(root / "logps", found.pairs, found.model)
    found.suites_reference = publish(root / "suites-logps", [found.far, found.near], found.model)
    return found


@pytest.fixture
def evaluate(given, tmp_path, monkeypatch):
    monkeypatch.setenv("REFCACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(engines.PolicyEngines, "_proves", lambda *_: True)  # its rows are not counted

    def run(policies, suites=SUITES, **changes):
        cells = [Cell(name, 0, BETA, folder, tmp_path / f"{name}.json") for name, folder in policies.items()]
        options = {"suites": given.suites, "suites_reference": given.suites_reference, "engine": ENGINE} | changes
        params = EvaluateParams(prompts=0, suites=suites)
        paths = {"pairs": given.pairs, "reference_model": given.model, "reference": given.reference}
        return evaluate_cells(cells, params=params, **paths, **options)

    return run


@pytest.fixture
def asked(monkeypatch):
    found = []
    score = process.EngineProcess.score

    def counted(engine, rows, advance):
        found.extend((prompt.tobytes(), response.tobytes()) for prompt, response in rows)
        return score(engine, rows, advance)

    monkeypatch.setattr(process.EngineProcess, "score", counted)
    return found


@pytest.fixture
def no_model_loads(monkeypatch):
    monkeypatch.setattr(process.EngineProcess, "load", lambda *_, **__: pytest.fail("an engine was built"))


def expected(folder, policy, reference, *, leave_out=()):
    """Accuracies by loops over a suite's questions, each with one chosen and several rejected answers."""
    responses, wins, best = read_responses(folder), {}, {}
    own, theirs = sums_under(policy, responses), sums_under(reference, responses)
    judges = {
        "reward": lambda key: BETA * (sum(own[key]) - sum(theirs[key])),
        "logp": lambda key: sum(own[key]),
        "token_logp": lambda key: statistics.fmean(own[key]),
    }
    pairs = read_pairs(folder)
    for name, judge in judges.items():
        won = pl.Series([judge(c) > judge(r) for c, r in pairs.select("chosen_key", "rejected_key").iter_rows()])
        wins[name] = won.mean()
        rows = pairs.with_columns(won.alias("won")).group_by("source", maintain_order=True).agg(pl.col("won").all())
        best[name] = rows["won"][len(leave_out) :].mean()
    return {f"{name}_accuracy": value for name, value in wins.items()} | {
        f"best_of_{name}": value for name, value in best.items()
    }


@pytest.mark.slow
def test_suites_are_judged_by_what_transformers_says_and_nothing_is_asked_twice(evaluate, given, asked, tmp_path):
    policies = {name: write_model(tmp_path / name, seed=seed) for seed, name in enumerate("ab", 1)}
    done = evaluate(policies)
    far, near = (read_responses(folder) for folder in (given.far, given.near))
    test = read_responses(given.pairs).filter(pl.col("split") == "test")
    distinct = pl.concat([test, far, near])["response_key"].n_unique()
    assert distinct < len(test) + len(far) + len(near) and len(asked) == 2 * distinct

    for name, folder in policies.items():
        content = done.cells[f"{name}-0"]
        assert json.loads((tmp_path / f"{name}.json").read_text()) == content
        assert list(content["suites"]) == ["far", "near"]
        for suite, domain, apart in (("far", "out", ["ref:0", "tied:0"]), ("near", "in", [])):
            found, pairs = content["suites"][suite], read_pairs(given.suites / suite)
            assert found["domain"] == domain and found["pairs"] == len(pairs)
            assert found["prompts"] == found["rows"] == pairs["source"].n_unique()
            wanted = expected(given.suites / suite, folder, given.model, leave_out=apart)
            assert {measure: found[measure]["value"] for measure in wanted} == pytest.approx(wanted)
            of_reference = expected(given.suites / suite, given.model, given.model, leave_out=apart)
            assert found["reference"]["logp_accuracy"]["value"] == of_reference["logp_accuracy"]
            assert found["reference"]["best_of_token_logp"]["value"] == of_reference["best_of_token_logp"]
            assert found["logp_accuracy"]["low"] < wanted["logp_accuracy"] < found["logp_accuracy"]["high"]
            assert found["categories"].keys() == {"even", "odd"} and ("ties" in found) == (suite == "far")
    assert done.cells["a-0"]["suites"] != done.cells["b-0"]["suites"]

    of_variant = scores_over_seeds(list(done.cells.values()))["suites"]["far"]  # as the report reads it
    both = [cell["suites"]["far"]["reward_accuracy"]["value"] for cell in done.cells.values()]
    assert of_variant["reward_accuracy"]["mean"] == pytest.approx(statistics.fmean(both))
    assert of_variant["categories"]["odd"]["best_of_reward"]["seeds"] == 2

    before = len(asked)
    assert evaluate(policies) == done._replace(starts=0, asked=0) and len(asked) == before
    # A suite less asks nothing either, and cells without suites are as they were.
    plain = evaluate(policies, suites={}, suites_reference=None)
    assert len(asked) == before and "suites" not in plain.cells["a-0"]
    for cell in plain.cells.values():
        assert cell == {name: value for name, value in done.cells[f"{cell['variant']}-0"].items() if name != "suites"}


@pytest.mark.slow
def test_the_reference_as_its_own_policy_wins_no_pair_beyond_rounding(evaluate, given):
    found = evaluate({"same": given.model}).cells["same-0"]["suites"]["far"]
    assert found["logp_accuracy"] == found["reference"]["logp_accuracy"]
    assert found["best_of_token_logp"] == found["reference"]["best_of_token_logp"]


# refused before an engine starts --------------------------------------------------------------------------------------


def test_other_suites_than_the_prepared_ones_are_named(evaluate, given, no_model_loads):
    with pytest.raises(RequestError, match=r"far, near, evaluate\.suites names far\. Run `dvc repro evaluate`"):
        evaluate({"a": given.model}, suites={"far": SUITES["far"]})
    with pytest.raises(RequestError, match=r"evaluate\.suites names no suite"):
        evaluate({"a": given.model}, suites={})


def test_suites_that_were_not_scored_are_told(evaluate, given, tmp_path, no_model_loads):
    some = publish(tmp_path / "some", [given.far, given.near], given.model, without=2)
    with pytest.raises(CacheIncomplete, match="dvc repro score"):
        evaluate({"a": given.model}, suites_reference=some)


def test_rows_that_the_model_cant_take_are_refused(tmp_path, no_model_loads):
    short = write_model(tmp_path / "short", max_position_embeddings=25)
    suites = tmp_path / "suites"
    folder = write_pairs(suites / "near", 10, test_share=0.6)
    write_rows(folder, [])
    (suites / INDEX).write_text('["near"]')
    near = {"near": SUITES["near"]}
    pairs = write_pairs(tmp_path / "pairs", 1, responses=2, test_share=1.0, seed=12)
    reference = write_reference_cache(tmp_path / "logps", pairs, short)
    longest = read_responses(pairs).select(pl.col("prompt_ids").list.len() + pl.col("response_ids").list.len())
    assert longest.max().item() <= 25  # else this shows nothing: the pairs themselves fit
    # Their log-probs can't be known, but the cache is asked first.
    made_up = read_responses(folder)
    table = logps_table(
        response_keys=made_up["response_key"].to_list(),
        prompt_keys=made_up["prompt_key"].to_list(),
        n_prompt_tokens=made_up["prompt_ids"].list.len().to_list(),
        token_ids=made_up["response_ids"].to_list(),
        token_logps=[[-1.0] * len(ids) for ids in made_up["response_ids"]],
    )
    out = tmp_path / "suites-logps"
    publish_reference(out, table, reference_identity(short, dtype="float32", quantization=None))
    cells = [Cell("a", 0, BETA, short, tmp_path / "a.json")]
    with pytest.raises(RequestError, match=r"tokens with its prompt, but .*short has 25 positions"):
        evaluate_cells(
            cells,
            pairs=pairs,
            reference_model=short,
            reference=reference,
            params=EvaluateParams(prompts=0, suites=near),
            engine=ENGINE,
            suites=suites,
            suites_reference=out,
        )


def test_both_options_or_none(tmp_path):
    project = Project(tmp_path)
    result = project.run("evaluate", *f"--pairs p --model m --reference r --suites s --params {PARAMS}".split())
    assert result.exit_code == 2 and "go together" in result.output
