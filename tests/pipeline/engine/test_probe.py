"""The rows that an engine must answer before it scores real ones."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.engine.probe import make_probe, probe_rows
from tests.tiny import POSITIONS, VOCABULARY, write_model
from tests.tiny_reference import transformers_token_logps


@given(vocabulary=st.integers(2, 200_000), longest=st.integers(2, 2000))
def test_rows_fit_the_model_and_the_engine(vocabulary, longest):
    for prompt, response in probe_rows(vocabulary, longest):
        assert len(prompt) >= 1 and len(response) >= 1 and len(prompt) + len(response) <= longest
        ids = np.concatenate([prompt, response])
        assert ids.min() >= 0 and ids.max() < vocabulary


def test_rows_share_a_prompt_longer_than_blocks_and_begin_alike():
    (prompt, whole), (_, changed), (_, start), *_ = probe_rows(1000, 1000)
    assert len(prompt) > 128 and len(prompt) % 32
    assert (whole[:-1] == changed[:-1]).all() and whole[-1] != changed[-1] and (start == whole[:1]).all()


@pytest.fixture(scope="module")
def probe(tmp_path_factory):
    model = write_model(tmp_path_factory.mktemp("model"))
    options = {"dtype": "float32", "quantization": None, "trust_remote_code": False}
    return model, make_probe(model, vocabulary=VOCABULARY, longest=POSITIONS, **options)


def test_right_answers_pass(probe):
    model, made = probe
    whole = transformers_token_logps(model, made.rows)
    right = [logps[len(prompt) - 1 :] for logps, (prompt, _) in zip(whole, made.rows, strict=True)]
    assert made.largest_difference(right) < 1e-4 < made.tolerance


@pytest.mark.parametrize("wrong", ["shifted", "scaled", "short", "nan"])
def test_wrong_answers_do_not(probe, wrong):
    model, made = probe
    whole = transformers_token_logps(model, made.rows)
    found = {
        "shifted": [w[len(p) - 2 : -1] if len(p) > 1 else w for w, (p, _) in zip(whole, made.rows, strict=True)],
        "scaled": [0.9 * logps for logps in made.logps],
        "short": [logps[1:] for logps in made.logps],
        "nan": [np.full_like(logps, np.nan) for logps in made.logps],
    }[wrong]
    assert made.largest_difference(found) > made.tolerance
