"""One engine for several policies: each is answered for as by an engine of its own, or it gets one."""

import os
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from pipeline.engine.process import EngineProcess
from pipeline.engine.rows import EngineLength
from pipeline.errors import EngineFailed
from pipeline.params import ScoreParams
from pipeline.policies import engines as module
from pipeline.policies.engines import Needs, PolicyEngines, lora_rank
from pipeline.policies.identity import open_policy
from pipeline.reference.identity import reference_identity
from tests.tiny import POSITIONS, write_model
from tests.tiny_reference import adversarial_rows, quick_engine, transformers_token_logps

PARAMS = ScoreParams(enforce_eager=True)
LENGTH = EngineLength(POSITIONS + 1, True)


@pytest.fixture(scope="module", autouse=True)
def quick(tmp_path_factory):
    with quick_engine() as patch:
        patch.setenv("REFCACHE_HOME", str(tmp_path_factory.mktemp("home")))
        yield


def adapt(base, folder, seed, **changes):
    """A LoRA that has moved, in `folder`; and the same merged, for transformers."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    options = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False} | changes
    policy = get_peft_model(model, LoraConfig(**options))
    policy.save_pretrained(folder / "adapter")
    policy.merge_and_unload().save_pretrained(folder / "merged")
    return folder / "adapter", folder / "merged"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """With tied embeddings, where more goes wrong."""
    return write_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def identity(base):
    return reference_identity(base, dtype="float32", quantization=None)


@pytest.fixture(scope="module")
def rows():
    return sorted(adversarial_rows(), key=lambda row: row[0].tobytes())


def exact(model, rows):
    whole = transformers_token_logps(model, rows)
    return [logps[len(prompt) - 1 :] for logps, (prompt, _) in zip(whole, rows, strict=True)]


def furthest(engine, rows, expected):
    found = engine.score(rows, lambda *_: None).logps
    return max(float(np.abs(a - b).max()) for a, b in zip(found, expected, strict=True))


@pytest.fixture
def sharing(base):
    """Engines for the policies in some folders, and the reference."""

    def share(*folders, base=base):
        identity = reference_identity(base, dtype="float32", quantization=None)
        policies = [open_policy(folder.name, folder, identity) for folder in folders]
        reference = open_policy("reference", base, identity)
        running = PolicyEngines([*policies, reference], base, PARAMS, log="test")
        running.prepare(Needs(LENGTH))
        return running, policies, reference

    return share


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_exchanged_weights_answer_as_those_of_an_engine_of_their_own(sharing, rows, tmp_path, tied):
    """Tied heads too, whose copy for CPU kernels vLLM 0.32 leaves as it was."""
    names = ("reference", "one", "two")
    base, *folders = (
        write_model(tmp_path / name, seed=seed, tie_word_embeddings=tied) for seed, name in enumerate(names)
    )
    running, policies, reference = sharing(*folders, base=base)
    with running:
        for policy in [*policies, reference, policies[0]]:
            assert furthest(running.use(policy), rows, exact(policy.folder, rows)) < 1e-4
        assert (running.starts, running.exchanges) == (1, 4)
        shared = running.use(policies[0]).score(rows, lambda *_: None).logps
    with EngineProcess(PARAMS, log=tmp_path / "fresh.log") as fresh:
        fresh.load(policies[0].folder, LENGTH, sampling=True)
        assert furthest(fresh, rows, shared) < 1e-4


@pytest.mark.slow
def test_adapters_come_with_the_request_and_leave_with_it(base, sharing, rows, tmp_path):
    (one, merged_one), (two, merged_two) = (adapt(base, tmp_path / str(seed), seed) for seed in (1, 2))
    running, policies, reference = sharing(one, two)
    with running:
        for policy, whole in [(policies[0], merged_one), (reference, base), (policies[1], merged_two)]:
            assert furthest(running.use(policy), rows, exact(whole, rows)) < 1e-4
        assert (running.starts, running.exchanges, running.adapted) == (1, 0, 2)


@pytest.mark.slow
def test_an_adapter_that_vllm_refuses_is_merged(base, sharing, rows, tmp_path, capsys):
    adapter, merged = adapt(base, tmp_path, 1, use_dora=True)
    running, [policy], reference = sharing(adapter)
    with running:
        assert furthest(running.use(policy), rows, exact(merged, rows)) < 1e-4
        assert furthest(running.use(reference), rows, exact(base, rows)) < 1e-4
        assert furthest(running.use(policy), rows, exact(merged, rows)) < 1e-4
        assert running.starts == 2  # one that took no DoRA
    assert not list(Path(os.environ["REFCACHE_HOME"]).glob("tmp/merged-*"))
    assert "does not take the adapter" in capsys.readouterr().err


@pytest.mark.slow
def test_where_an_exchange_goes_wrong_each_policy_gets_an_engine_of_its_own(
    base, sharing, rows, tmp_path, monkeypatch, capsys
):
    """An exchange that does nothing: the engine keeps its noise."""
    monkeypatch.setattr(EngineProcess, "exchange", lambda *_: None)
    folder = write_model(tmp_path / "policy", seed=1)
    running, [policy], reference = sharing(folder)
    with running:
        assert furthest(running.use(policy), rows, exact(folder, rows)) < 1e-4
        assert furthest(running.use(reference), rows, exact(base, rows)) < 1e-4
        assert running.starts == 3
    assert "an engine of its own" in capsys.readouterr().err


@pytest.mark.slow
def test_where_an_adapter_is_answered_for_wrongly_it_is_merged(base, sharing, rows, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(EngineProcess, "adapt", lambda *_: None)
    adapter, merged = adapt(base, tmp_path, 1)
    running, [policy], _ = sharing(adapter)
    with running:
        assert furthest(running.use(policy), rows, exact(merged, rows)) < 1e-4
    assert "nats from transformers'" in capsys.readouterr().err


class Stubborn:
    """In place of EngineProcess: one that can be built only for one model alone."""

    ended = False
    built: ClassVar[list[str]] = []

    def __init__(self, params, *, log):
        pass

    def load(self, folder, length, *, exchangeable, lora_rank, **options):
        if exchangeable or lora_rank:
            raise EngineFailed("The vLLM engine did not start: not for this architecture.")
        self.built.append(folder.name)

    def kill(self):
        pass

    close = kill


def test_where_nothing_can_be_shared_every_policy_has_its_engine(base, sharing, tmp_path, monkeypatch, capsys):
    """An architecture that takes no adapters, or a runner that exchanges no weights, costs time and no figures."""
    monkeypatch.setattr(module, "EngineProcess", Stubborn)
    (adapter, _), whole = adapt(base, tmp_path, 1), write_model(tmp_path / "whole", seed=2)
    running, policies, reference = sharing(whole, adapter)
    Stubborn.built.clear()
    with running:
        for policy in [*policies, reference]:
            running.use(policy)
    assert [name.split("-")[0] for name in Stubborn.built] == ["whole", "merged", base.name.split("-")[0]]
    said = capsys.readouterr().err
    assert "Adapters are merged instead." in said and "an engine of its own" in said


def test_policies_of_other_shapes_are_never_exchanged(base, identity, tmp_path):
    other = open_policy("other", write_model(tmp_path / "other", num_hidden_layers=1), identity)
    assert other.shape != open_policy("reference", base, identity).shape


@pytest.mark.parametrize(
    ("ranks", "expected"), [([4], 8), ([8], 8), ([4, 9], 16), ([512], 512), ([513], None), ([None], None)]
)
def test_memory_is_reserved_for_the_largest_rank(base, identity, ranks, expected, tmp_path, monkeypatch):
    configs = iter({"r": rank} for rank in ranks)
    monkeypatch.setattr(module, "_adapter_config", lambda _: next(configs))
    policies = [open_policy("p", base, identity)._replace(identity=_adapter_of(identity)) for _ in ranks]
    assert lora_rank(policies) == expected


def test_a_rank_pattern_counts(base, identity, monkeypatch):
    monkeypatch.setattr(module, "_adapter_config", lambda _: {"r": 4, "rank_pattern": {"up_proj": 70}})
    assert lora_rank([open_policy("p", base, identity)._replace(identity=_adapter_of(identity))]) == 128


def _adapter_of(identity):
    import dataclasses

    return dataclasses.replace(identity, adapter="some")
