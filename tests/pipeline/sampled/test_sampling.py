"""The sample stage with the real engine on the tiny model, its reward model against transformers, and its refusals."""

import json

import numpy as np
import polars as pl
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForSequenceClassification

from cache import prompt_key, response_key
from pipeline.data.tables import read_pairs, read_responses
from pipeline.engine import process
from pipeline.errors import EngineFailed, RequestError
from pipeline.params import Params, PrepareParams, SampleParams, ScoreParams
from pipeline.sampled.rewards import Dialogue, reward_scores, turns_of
from pipeline.sampled.sampling import sample_pairs
from pipeline.sampled.scorers import Asked
from tests.tiny import EOS, TINY_MODEL, VOCABULARY, text, write_model, write_pairs, write_tokenizer
from tests.tiny_reference import quick_engine

ENGINE = ScoreParams(enforce_eager=True, rows_per_call=16)


def count_words(prompt: str, answer: str) -> float:
    """A reward for the tests: how many different words an answer has."""
    return float(len(set(answer.split())))


SAMPLE = SampleParams(
    scorer="function", function=f"{__name__}:count_words", n=4, temperature=1.0, top_p=1.0, max_new_tokens=12, seed=3
)


@pytest.fixture(scope="module", autouse=True)
def quick(tmp_path_factory):
    with quick_engine() as patch:
        patch.setenv("REFCACHE_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs"), 16, test_share=0.25)


@pytest.fixture(scope="module")
def sample(model, tokenizer, prepared):
    def call(out, params=SAMPLE, prepare=PrepareParams(), **changes):  # noqa: B008 (frozen)
        options = {"pairs": prepared, "model": model, "tokenizer": tokenizer, "engine": ENGINE} | changes
        return sample_pairs(params=params, prepare=prepare, out=out, **options)

    return call


@pytest.fixture(scope="module")
def sampled(sample, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "sampled"
    return out, sample(out)


@pytest.mark.slow
def test_the_best_answer_is_paired_with_the_worst(sampled, prepared):
    out, summary = sampled
    answers, pairs = pl.read_parquet(out / "answers.parquet"), read_pairs(out / "pairs", "train")
    train = read_pairs(prepared, "train")
    assert set(answers["prompt_key"]) == set(train["prompt_key"])
    assert answers["prompt_key"].value_counts()["count"].unique().to_list() == [4]
    for row in answers.iter_rows(named=True):
        assert row["score"] == count_words("", row["response_text"])
        assert row["response_text"] == text([i for i in row["response_ids"] if i > EOS])
        assert row["truncated"] is (row["response_ids"][-1] != EOS)
        assert len(row["response_ids"]) <= 12
    by_prompt = {key: of.filter(pl.col("response_text") != "") for (key,), of in answers.group_by("prompt_key")}
    expected = {key: (of["score"].max(), of["score"].min()) for key, of in by_prompt.items()}
    expected = {key: (most, least) for key, (most, least) in expected.items() if most > least}
    found = {row["prompt_key"]: (row["chosen_reward"], row["rejected_reward"]) for row in pairs.to_dicts()}
    assert found == expected and len(pairs) == len(found) == summary["pairs"]
    assert summary["prompts_all_alike"] == len(by_prompt) - len(found)


@pytest.mark.slow
def test_the_tables_are_prepared_ones_with_the_very_tokens_that_were_drawn(sampled, prepared):
    out, _ = sampled
    pairs, responses = read_pairs(out / "pairs"), read_responses(out / "pairs")
    test = pl.col("split") == "test"
    columns = [name for name in pairs.columns if name != "pair_id"]
    assert pairs.filter(test).select(columns).equals(read_pairs(prepared, "test").select(columns))
    assert pairs["pair_id"].to_list() == list(range(len(pairs)))
    held_out = read_responses(prepared).filter(test).sort("response_key")
    assert responses.filter(test).sort("response_key").equals(held_out)
    keys = {row["response_key"]: row for row in responses.to_dicts()}
    assert keys.keys() == set(pairs["chosen_key"]) | set(pairs["rejected_key"])
    for key, row in keys.items():
        assert key == response_key(row["prompt_ids"], row["response_ids"])
        assert row["prompt_key"] == prompt_key(row["prompt_ids"])
    drawn = pl.read_parquet(out / "answers.parquet")
    texts = dict(zip(drawn["response_key"], drawn["response_text"], strict=True))
    for row in pairs.filter(~test).to_dicts():
        assert (row["chosen_text"], row["rejected_text"]) == (texts[row["chosen_key"]], texts[row["rejected_key"]])


@pytest.mark.slow
def test_rows_have_the_form_that_prepare_reads(sampled):
    out, _ = sampled
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    pairs = read_pairs(out / "pairs", "train")
    assert [(row["prompt"], row["chosen"], row["rejected"]) for row in rows] == pairs.select(
        "prompt_text", "chosen_text", "rejected_text"
    ).rows()
    assert all(row["chosen_reward"] > row["rejected_reward"] for row in rows)


@pytest.mark.slow
def test_nothing_is_drawn_twice_and_other_settings_are_drawn_anew(sample, sampled, tmp_path, monkeypatch):
    out, summary = sampled
    asked = []
    generate = process.EngineProcess.generate

    def counted(engine, prompts, advance, **options):
        asked.extend(prompt.tobytes() for prompt in prompts)
        return generate(engine, prompts, advance, **options)

    monkeypatch.setattr(process.EngineProcess, "generate", counted)
    assert sample(tmp_path / "again") == summary and not asked
    for name in ("answers.parquet", "rows.jsonl", "pairs/pairs.parquet", "pairs/responses.parquet"):
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()
    few = sample(tmp_path / "few", SAMPLE.model_copy(update={"prompts": 3}))
    assert few["prompts"] == 3 and not asked  # the same answers, since a seed belongs to its prompt
    sample(tmp_path / "other", SAMPLE.model_copy(update={"seed": 4}))
    assert len(asked) == summary["prompts"]


@pytest.mark.slow
def test_an_engine_that_dies_costs_the_call_under_way(sample, tmp_path, monkeypatch):
    monkeypatch.setenv("REFCACHE_HOME", str(tmp_path / "home"))
    generate, calls = process.EngineProcess.generate, []

    def dies(engine, prompts, advance, **options):
        calls.append(len(prompts))
        if len(calls) == 2:
            engine.kill()
            raise EngineFailed("killed")
        return generate(engine, prompts, advance, **options)

    monkeypatch.setattr(process.EngineProcess, "generate", dies)
    with pytest.raises(EngineFailed):
        sample(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    summary = sample(tmp_path / "out")
    assert sum(calls) - calls[1] == summary["prompts"]  # the lost call alone was asked again


def test_off_leaves_a_summary_alone(sample, tmp_path):
    out = tmp_path / "out"
    (out / "pairs").mkdir(parents=True)
    assert sample(out, SampleParams()) == {"scorer": "none"}
    assert [path.name for path in out.iterdir()] == ["summary.json"]


@pytest.fixture
def no_engine(monkeypatch):
    monkeypatch.setattr(process, "start_server", lambda *_: pytest.fail("an engine was started"))


def test_a_scorer_that_can_not_be_had_is_refused_before_anything_is_drawn(sample, no_engine, tmp_path):
    with pytest.raises(RequestError, match="importing nowhere_at_all"):
        sample(tmp_path, SAMPLE.model_copy(update={"function": "nowhere_at_all:f"}))


def test_answers_beyond_the_models_positions_are_refused(sample, no_engine, tmp_path):
    with pytest.raises(RequestError, match=r"sample\.max_new_tokens is 299.*Set it to 28\d or less"):
        sample(tmp_path, SAMPLE.model_copy(update={"max_new_tokens": 299}))


@pytest.mark.slow
def test_answers_that_all_score_alike_leave_what_was_there(sample, sampled, tmp_path):
    out = tmp_path / "out"
    sample(out)
    before = (out / "rows.jsonl").read_bytes()
    with pytest.raises(RequestError, match=r"differ in score.*what was sampled is kept"):
        sample(out, SAMPLE.model_copy(update={"min_gap": 100.0}))
    assert (out / "rows.jsonl").read_bytes() == before and not list(tmp_path.glob(".out*"))


@pytest.mark.slow
def test_prompts_of_files_come_with_their_answers_and_without_the_test_prompts(sample, prepared, tmp_path):
    held_out = read_pairs(prepared, "test")["prompt_text"][0]
    rows = [("w5 w6", "w7 w8"), ("w9 w10 w11", "w12"), (held_out, "w3")]
    lines = [json.dumps({"prompt": prompt, "completion": answer}) for prompt, answer in rows]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    params = SAMPLE.model_copy(update={"files": ["prompts.jsonl"], "function": f"{__name__}:likeness"})
    prepare = PrepareParams(input=str(tmp_path), chat_template="never")
    sample(tmp_path / "out", params, prepare)
    answers = pl.read_parquet(tmp_path / "out/answers.parquet")
    assert set(answers.select("prompt_text", "reference").rows()) == set(rows[:2])
    for row in answers.to_dicts():
        assert row["score"] == likeness("", row["response_text"], row["reference"])


def likeness(prompt: str, answer: str, reference: str) -> float:
    return len(answer.split()) + 0.01 * len(reference)


def test_training_on_sampled_pairs_needs_a_scorer(demo_params):
    with pytest.raises(ValueError, match=r"pairs: sampled.*sample\.scorer"):
        Params.model_validate(demo_params | {"pairs": "sampled"})


@pytest.fixture
def demo_params():
    from ruamel.yaml import YAML

    from tests import ROOT

    return YAML(typ="safe", pure=True).load(ROOT / "params.yaml")


# the reward model -----------------------------------------------------------------------------------------------------


def write_reward_model(folder, classes=1):
    torch.manual_seed(5)
    config = TINY_MODEL | {"vocab_size": VOCABULARY, "initializer_range": 0.3, "pad_token_id": 0}
    Qwen2ForSequenceClassification(Qwen2Config(**config, num_labels=classes)).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.mark.slow
def test_rewards_are_transformers_logits_and_are_kept(tmp_path, tokenizer, monkeypatch):
    from pipeline.model.tokenizer import open_tokenizer

    folder = write_reward_model(tmp_path / "reward")
    random = np.random.default_rng(0)
    asked, dialogues = [], []
    for _ in range(40):
        prompt, answer = (random.integers(3, VOCABULARY, random.integers(1, 40)) for _ in range(2))
        asked.append(Asked(text(prompt.tolist()) + " ", text(answer.tolist()), None))
        dialogues.append(Dialogue(asked[-1].prompt, prompt.astype(np.int32)))
    options = {"folder": folder, "tokenizer": open_tokenizer(tokenizer), "engine": ENGINE}
    found = reward_scores(asked, dialogues, **options)
    loaded = Qwen2ForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    ids = open_tokenizer(folder)
    with torch.no_grad():
        expected = [loaded(torch.tensor([ids(row.prompt + row.text)["input_ids"]])).logits.item() for row in asked]
    assert np.std(expected) > 0.1
    np.testing.assert_allclose(found, expected, atol=1e-4)
    monkeypatch.setattr(process, "start_server", lambda *_: pytest.fail("an engine was started"))
    assert reward_scores(asked, dialogues, **options) == found


def test_a_classifier_of_several_classes_is_no_reward_model(tmp_path, tokenizer):
    with pytest.raises(RequestError, match="has 3 classes, expected 1"):
        reward_scores([], [], folder=write_reward_model(tmp_path, 3), tokenizer=None, engine=ENGINE)


class Template:
    """Renders turns as role and content, and turns text into character codes."""

    chat_template = "some"

    def apply_chat_template(self, turns, *, tokenize, add_generation_prompt):
        assert not tokenize and add_generation_prompt
        return "".join(f"<{turn['role']}>{turn['content']}" for turn in turns) + "<assistant>"

    def __call__(self, rendered, *, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [ord(letter) for letter in rendered]}


def dialogue(readable: str, rendered: str) -> Dialogue:
    return Dialogue(readable, np.array([ord(letter) for letter in rendered + "<assistant>"], np.int32))


@pytest.mark.parametrize(
    ("readable", "rendered", "turns"),
    [
        ("Hi", "<user>Hi", [("user", "Hi")]),
        ("[user] Hi", "<user>[user] Hi", [("user", "[user] Hi")]),  # one turn that begins so
        ("[system] Be kind\n\n[user] Hi", "<system>Be kind<user>Hi", [("system", "Be kind"), ("user", "Hi")]),
        ("[user] a\n\nb\n\n[assistant] c\n\n[user] d", "<user>a\n\nb<assistant>c<user>d", None),
    ],
)
def test_turns_are_found_in_the_text_and_proved_by_the_ids(readable, rendered, turns):
    found = [(turn["role"], turn["content"]) for turn in turns_of(dialogue(readable, rendered), Template())]
    assert found == (turns or [("user", "a\n\nb"), ("assistant", "c"), ("user", "d")])


def test_turns_that_can_not_be_told_are_refused():
    with pytest.raises(RequestError, match="can't be told from its text"):
        turns_of(dialogue("[user] a\n\n[user] b", "<user>a\n\n[user] b"), Template())
