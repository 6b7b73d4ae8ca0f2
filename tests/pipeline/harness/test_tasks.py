"""What evaluate.tasks may name, where items come from, and what is refused before any engine starts."""

from importlib.util import find_spec

import pytest

pytest.importorskip("lm_eval")

from pipeline.errors import RequestError
from pipeline.harness import needs, tasks
from pipeline.harness.tasks import Tasks
from pipeline.params import EvaluateParams
from tests.pipeline.harness.small_tasks import choices, texts, write_chat_model, write_lines, write_tasks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_chat_model(tmp_path_factory.mktemp("model"), positions=4000)


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """No hub is asked, and no data is in the cache."""
    import datasets.config
    from huggingface_hub import constants

    monkeypatch.setenv("REFCACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture
def check(model):
    def call(*names, **changes):
        made = Tasks(EvaluateParams(tasks=[str(name) for name in names], **changes), model)
        made.check()
        return made._built

    return call


def prompts(built, name):
    return [instance.args[0] for instance in built.tasks[name].instances]


def test_no_tasks_need_nothing(model, monkeypatch):
    monkeypatch.setattr(needs, "find_spec", lambda name: None)
    none = Tasks(EvaluateParams(), model)
    none.check()
    assert not none and (none.longest, none.needs_tokenizer) == (0, False)


def test_without_the_harness_its_installation_is_named(check, tmp_path, monkeypatch):
    monkeypatch.setattr(needs, "find_spec", lambda name: None if name == "lm_eval" else find_spec(name))
    with pytest.raises(RequestError, match=r"not installed.*pip install -e \.\[eval\]"):
        check(write_tasks(tmp_path))


def test_a_folder_means_all_its_tasks_and_a_file_its_own(check, tmp_path):
    folder = write_tasks(tmp_path)
    assert check(folder).tasks.keys() == {"small_choice", "small_text"}
    assert check(folder / "text.yaml").tasks.keys() == {"small_text"}


def test_a_group_of_a_folder_runs_once_and_is_aggregated(check, tmp_path):
    folder = write_tasks(tmp_path)
    metric = "{metric: exact_match, filter_list: all, weight_by_size: true}"
    (folder / "group.yaml").write_text(
        f"group: small\ntask: [small_choice, small_text]\naggregate_metric_list: [{metric}]"
    )
    built = check(folder)
    assert list(built.groups) == ["small"] and built.tasks.keys() == {"small_choice", "small_text"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("task: [", r"choice\.yaml in evaluate\.tasks can't be read"),
        ("task: small_text", r"text\.yaml defines small_text, which another file"),
        ("task: odd\ndataset_path: json\noutput_type: essay", "odd in evaluate.tasks can't be loaded.*essay"),
        ("include: absent.yaml", r"choice\.yaml in evaluate\.tasks can't be read.*absent\.yaml"),
    ],
)
def test_a_broken_file_is_named(check, tmp_path, text, expected):
    folder = write_tasks(tmp_path)
    (folder / "choice.yaml").write_text(text)
    with pytest.raises(RequestError, match=expected):
        check(folder)


def test_paths_without_a_task_are_refused(check, tmp_path):
    with pytest.raises(RequestError, match=r"none\.yaml, which does not exist.*YAML"):
        check(tmp_path / "none.yaml")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RequestError, match=r"has no \*\.yaml file"):
        check(tmp_path / "empty")


def test_an_unknown_name_is_told_with_near_ones(check, monkeypatch):
    from pipeline.harness import names

    class Few:
        task_index, all_tasks = {"mmlu_pro": None}, ["mmlu_pro", "ifeval", "arc_easy"]

        def __init__(self, **_):
            pass

    monkeypatch.setattr(names, "TaskManager", Few)  # the whole index takes ten seconds
    with pytest.raises(RequestError, match=r"names mmlu_pr,.*not know\. Near it are mmlu_pro"):
        check("mmlu_pr")


def test_data_that_is_nowhere_is_asked_for_before_an_engine_starts(check):
    with pytest.raises(RequestError, match=r"data of arc_easy.*can't be had.*task_data as arc_easy\.jsonl"):
        check("arc_easy")


GSM8K = [{"question": f"How much is {i} and {i}?", "answer": f"Twice {i}.\n#### {2 * i}"} for i in range(1, 6)]


def test_papers_four_shots_are_the_harness_task_with_four_of_its_examples(check, tmp_path):
    write_lines(tmp_path / "gsm8k_cot.jsonl", GSM8K)
    built = check("gsm8k_cot_4shot", task_data=str(tmp_path), fewshot=1, limit=3)
    assert built.tasks.keys() == {"gsm8k_cot_4shot"}
    asked = prompts(built, "gsm8k_cot_4shot")
    assert len(asked) == 3 and all(prompt.count("The answer is") == 4 for prompt in asked)
    [text] = [p for p in prompts(check("gsm8k_cot", task_data=str(tmp_path), limit=1), "gsm8k_cot")]
    assert text.count("The answer is") == 8


def test_a_group_takes_one_folder_of_data_for_all_its_tasks(check, tmp_path):
    folder = tmp_path / "mmlu_pro"
    folder.mkdir()
    subjects = ["biology", "business", "chemistry", "computer science", "economics", "engineering", "health"]
    subjects += ["history", "law", "math", "other", "philosophy", "physics", "psychology"]
    rows = [
        {
            "question": f"Which letter is first in {subject}?",
            "options": ["this", "that"],
            "answer": "A",
            "cot_content": "A: Let's think step by step. The answer is (A).",
            "category": subject,
        }
        for subject in subjects
    ]
    write_lines(folder / "test.jsonl", rows)
    with pytest.raises(RequestError, match=r"mmlu_pro_\w+, which with 5 examples.*also needs .*validation\.jsonl"):
        check("mmlu_pro", task_data=str(tmp_path))
    write_lines(folder / "validation.jsonl", rows)
    built = check("mmlu_pro", task_data=str(tmp_path), fewshot=1, apply_chat_template=False)
    assert len(built.tasks) == 14 and list(built.groups) == ["mmlu_pro"]
    assert prompts(built, "mmlu_pro_law")[0].count("first in law") == 2
    (folder / "validation.jsonl").unlink()
    assert len(check("mmlu_pro", task_data=str(tmp_path), fewshot=0).tasks) == 14


def test_files_in_task_data_take_the_place_of_a_tasks_own_data(check, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    write_lines(data / "small_choice.jsonl", choices()[:2])
    built = check(write_tasks(tmp_path), task_data=str(data))
    assert len(built.tasks["small_choice"].eval_docs) == 2 and len(built.tasks["small_text"].eval_docs) == 20
    with pytest.raises(RequestError, match=r"task_data is .*absent, which is no folder"):
        check(tmp_path / "tasks", task_data=str(tmp_path / "absent"))
    write_lines(data / "small_choice.jsonl", [])
    with pytest.raises(RequestError, match=r"small_choice\.jsonl, which is empty"):
        check(tmp_path / "tasks", task_data=str(data))


def test_examples_limit_and_template_reach_the_prompts(check, tmp_path):
    folder = write_tasks(tmp_path)
    plain = prompts(check(folder, limit=2, fewshot=3, apply_chat_template=False), "small_text")
    chat = prompts(check(folder, limit=2, fewshot=3), "small_text")
    assert len(plain) == len(chat) == 2
    assert plain[0].count("Q:") == 4 and plain[0].startswith("Q:")
    assert chat[0].count("<|user|>") == 4 and chat[0].endswith("<|assistant|>")
    assert texts()[0]["question"] in plain[0]


def test_a_tokenizer_without_a_template_is_said_once(check, tmp_path, capsys, monkeypatch):
    opened = tasks.open_tokenizer

    def bare(*arguments, **options):
        tokenizer = opened(*arguments, **options)
        tokenizer.chat_template = None
        return tokenizer

    monkeypatch.setattr(tasks, "open_tokenizer", bare)
    built = check(write_tasks(tmp_path))
    assert capsys.readouterr().err.count("has no chat template, so tasks are asked without one") == 1
    assert prompts(built, "small_text")[0].startswith("Q:")


@pytest.mark.parametrize(
    ("line", "expected"),
    [("unsafe_code: true", "runs code that the model writes"), ("doc_to_image: [a]", "images or sounds")],
)
def test_tasks_that_cannot_be_asked_here_are_refused(check, tmp_path, line, expected):
    folder = write_tasks(tmp_path)
    with (folder / "choice.yaml").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(RequestError, match=expected):
        check(folder)


IFEVAL = [
    {"key": 1, "prompt": "Greet me without commas.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
    {
        "key": 2,
        "prompt": "Write in English lowercase.",
        "instruction_id_list": ["change_case:english_lowercase"],
        "kwargs": [{}],
    },
    {
        "key": 3,
        "prompt": "Write at least 3 words.",
        "instruction_id_list": ["length_constraints:number_words"],
        "kwargs": [{"num_words": 3, "relation": "at least"}],
    },
]


def test_ifeval_says_what_it_would_download(check, tmp_path, monkeypatch):
    nltk = pytest.importorskip("nltk")

    def nothing(*_, **__):
        raise LookupError

    monkeypatch.setattr(nltk.data, "find", nothing)
    monkeypatch.setattr(nltk, "download", lambda *_: pytest.fail("a download"))
    write_lines(tmp_path / "ifeval.jsonl", IFEVAL)
    with pytest.raises(RequestError, match=r"python -m nltk\.downloader punkt_tab"):
        check("ifeval", task_data=str(tmp_path))
    monkeypatch.setattr(needs, "find_spec", lambda name: None if name == "langdetect" else find_spec(name))
    with pytest.raises(RequestError, match="needs langdetect, not installed"):
        check("ifeval", task_data=str(tmp_path))


def test_ifeval_judges_local_items_the_same_each_time(check, tmp_path, monkeypatch, model):
    nltk = pytest.importorskip("nltk")
    pytest.importorskip("langdetect")
    monkeypatch.setattr(nltk.data, "find", lambda *_: "there")  # these items are judged without it
    write_lines(tmp_path / "ifeval.jsonl", IFEVAL)
    from pipeline.harness import lm

    texts = ["Hello there", "ola amigo the end", "one two"]
    monkeypatch.setattr(lm.PolicyLM, "generate_until", lambda self, requests, **_: texts)
    made = Tasks(EvaluateParams(tasks=["ifeval"], task_data=str(tmp_path), max_length=3000), model)
    first, second = made.run(None, None), made.run(None, None)
    assert first.figures == second.figures
    assert first.answers["ifeval"].equals(second.answers["ifeval"])
    strict = first.answers["ifeval"]["prompt_level_strict_acc"].to_list()
    assert strict[0] == 1.0 and strict[2] == 0.0
    assert first.answers["ifeval"]["inst_level_strict_acc"].dtype.is_float()
