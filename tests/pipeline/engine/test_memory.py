"""What scoring adds to the engine's memory: bounded by chunk times vocabulary, not by the length of prompts."""

import numpy as np
import pytest

from pipeline.engine.probe import Probe
from pipeline.engine.process import EngineProcess
from pipeline.engine.rows import EngineLength
from pipeline.params import ScoreParams
from tests.tiny import TINY_MODEL
from tests.tiny_reference import quick_engine

pytestmark = pytest.mark.slow

VOCABULARY, PROMPT, RESPONSE = 151_936, 3072, 1024
BUDGET_MIB = 1200  # backends.LOGITS_BYTES and a little; all logits at once would be three arrays of 2,400 MiB


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("model")
    changes = {"vocab_size": VOCABULARY, "max_position_embeddings": PROMPT + RESPONSE + 1, "num_hidden_layers": 1}
    Qwen2ForCausalLM(Qwen2Config(**TINY_MODEL | changes)).save_pretrained(folder)
    return folder


def peak_mib(pid):
    with open(f"/proc/{pid}/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))


@pytest.mark.parametrize("backend", ["hidden_states", "prompt_logprobs"])
def test_long_prompts_with_a_large_vocabulary_stay_within_the_budget(model, tmp_path, backend):
    random = np.random.default_rng(0)
    ids = random.integers(0, VOCABULARY, PROMPT + RESPONSE).astype(np.int32)
    rows = [(ids[:PROMPT], ids[PROMPT:])]
    params = ScoreParams(enforce_eager=True, backend=backend, max_num_batched_tokens=8192)
    anything = Probe([(rows[0][0][:5], rows[0][1][:5])], [np.zeros(5, np.float32)], tolerance=1e9)
    with quick_engine(), EngineProcess(params, log=tmp_path / "engine.log") as engine:
        engine.load(model, EngineLength(PROMPT + RESPONSE + 1, beyond_limit=False), probe=anything)
        loaded = peak_mib(engine.pid)
        found = engine.score(rows, lambda rows, tokens=0: None).logps
        added = peak_mib(engine.pid) - loaded
    assert len(found[0]) == RESPONSE
    print(f"{backend}: {loaded:.0f} MiB loaded, {added:.0f} MiB added by scoring")
    assert added < BUDGET_MIB
