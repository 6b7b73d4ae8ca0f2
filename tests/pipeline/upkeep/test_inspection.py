import json

import numpy as np
import polars as pl
import pytest
from tokenizers import Tokenizer, models

from cache import CacheIncomplete, publish_reference
from pipeline.errors import RequestError
from pipeline.upkeep.inspection import inspect_reference, load_decoder
from tests.cache.rows import identity, keys_of, make_rows

N_ROWS = 400


@pytest.fixture
def folder(tmp_path):
    publish_reference(tmp_path / "logps", make_rows(0, N_ROWS), identity())
    return tmp_path / "logps"


@pytest.fixture
def tokenizer(tmp_path):
    """Token i is the word <wi>."""
    (tmp_path / "tokenizer").mkdir()
    words = Tokenizer(models.WordLevel({f"<w{i}>": i for i in range(1000)}, unk_token="<w0>"))
    words.save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    return tmp_path / "tokenizer"


def test_size_and_identity_are_those_of_the_cache(folder):
    found = inspect_reference(folder, tokenizer=None, extremes=1)
    rows = make_rows(0, N_ROWS)
    assert (found["rows"], found["tokens"]) == (N_ROWS, sum(rows["n_tokens"].to_pylist()))
    assert found["identity"] == identity().to_dict()
    assert found["reference_id"] == identity().reference_id
    assert [shard["rows"] for shard in found["shards"]] == [N_ROWS]


def test_row_distributions_are_exact(folder):
    found = inspect_reference(folder, tokenizer=None, extremes=0)
    sums = make_rows(0, N_ROWS)["sum_logp"].to_numpy()
    assert found["sum_logp"]["mean"] == pytest.approx(sums.mean(), rel=1e-12)
    assert (found["sum_logp"]["min"], found["sum_logp"]["max"]) == (sums.min(), sums.max())
    assert found["sum_logp"]["p50"] in np.sort(sums)[N_ROWS // 2 - 1 : N_ROWS // 2 + 1]
    assert found["n_tokens"]["max"] == 8


def test_token_distribution_is_exact_to_a_bin(folder):
    found = inspect_reference(folder, tokenizer=None, extremes=0)["token_logp"]
    logps = np.sort(make_rows(0, N_ROWS)["token_logps"].combine_chunks().flatten().to_numpy().astype(float))
    assert found["mean"] == pytest.approx(logps.mean(), rel=1e-12)
    assert (found["min"], found["max"]) == (logps[0], logps[-1])
    for name, q in {"p01": 0.01, "p25": 0.25, "p50": 0.5, "p99": 0.99}.items():
        assert found[name] == pytest.approx(np.quantile(logps, q, method="inverted_cdf"), abs=0.000_501)


def test_extreme_rows_are_the_true_ends_in_order_with_their_text(folder, tokenizer):
    found = inspect_reference(folder, tokenizer=tokenizer, extremes=3)["extremes"]
    rows = pl.DataFrame(make_rows(0, N_ROWS)).with_columns(mean_logp=pl.col("sum_logp") / pl.col("n_tokens"))
    for order in ("mean_logp", "sum_logp"):
        lowest, highest = rows.sort(order).head(3), rows.sort(order, descending=True).head(3)
        for end, expected in (("lowest", lowest), ("highest", highest)):
            shown = found[f"{end}_{order}"]
            assert [row[order] for row in shown] == expected[order].to_list()
            assert [row["response_key"] for row in shown] == [key.hex() for key in expected["response_key"]]
            texts = ["".join(f"<w{i}>" for i in ids) for ids in expected["token_ids"]]
            assert [row["text"].replace(" ", "") for row in shown] == texts


def test_ties_are_broken_the_same_way_every_time(tmp_path):
    rows = make_rows(0, 50)
    publish_reference(tmp_path, rows, identity())
    first, again = (inspect_reference(tmp_path, tokenizer=None, extremes=50) for _ in range(2))
    assert first == again
    assert len(first["extremes"]["lowest_sum_logp"]) == 50
    assert {row["response_key"] for row in first["extremes"]["lowest_sum_logp"]} == {k.hex() for k in keys_of(rows)}


def test_the_result_is_json_and_carries_the_drift(folder):
    assert inspect_reference(folder, tokenizer=None, extremes=1)["drift"] is None
    (folder / "drift.json").write_text('{"per_token": {"max": 1e-5}}')
    found = inspect_reference(folder, tokenizer=None, extremes=1)
    assert found["drift"] == {"per_token": {"max": 1e-5}, "worst": []}
    assert json.loads(json.dumps(found)) == found


def test_of_the_sampled_rows_only_those_that_drift_most_are_shown(folder):
    rows = [{"response_key": f"{n:032x}", "n_tokens": 3, "drift": 1.0 / n} for n in range(1, 9)]
    (folder / "drift.json").write_text(json.dumps({"flagged": 2, "sequences": rows}))
    assert inspect_reference(folder, tokenizer=None, extremes=2)["drift"] == {"flagged": 2, "worst": rows[:2]}


def test_an_empty_cache_has_no_distributions(tmp_path):
    publish_reference(tmp_path, make_rows(0, 0), identity())
    found = inspect_reference(tmp_path, tokenizer=None, extremes=5)
    assert found["rows"] == 0 and found["sum_logp"] is None and found["token_logp"] is None
    assert not any(found["extremes"].values())


def test_a_folder_without_cache_or_without_tokenizer_is_a_request_error(folder, tmp_path):
    with pytest.raises(CacheIncomplete, match="Expected a folder with"):
        inspect_reference(tmp_path, tokenizer=None, extremes=5)
    with pytest.raises(RequestError, match=r"holds no tokenizer"):
        load_decoder(folder)


@pytest.mark.slow  # imports transformers
def test_a_tokenizer_that_only_transformers_can_load_decodes_too(tmp_path):
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer()
    tokenizer.save_pretrained(tmp_path)
    assert not (tmp_path / "tokenizer.json").exists()
    assert load_decoder(tmp_path)(tokenizer("naïve").input_ids) == "naïve</s>"
