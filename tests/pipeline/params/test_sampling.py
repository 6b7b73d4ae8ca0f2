"""params.yaml's section `sample`: the stage is off unless asked for, and what a scorer lacks is told."""

import pytest

from pipeline.errors import RequestError
from pipeline.params import SampleParams, load_params
from tests import ROOT

DEFAULT = ROOT / "params.yaml"


def test_a_file_without_the_section_samples_nothing():
    sample = SampleParams()
    assert (sample.scorer, sample.n, sample.pairs, sample.prompts) == ("none", 8, "max_min", None)


@pytest.mark.parametrize(
    "section",
    [
        "{scorer: math, n: 2, temperature: 1, top_p: 1.0, prompts: 0, files: [questions.jsonl], min_gap: 0.5}",
        "{scorer: regex, pattern: '(?:so|thus) (\\d+)'}",
        "{scorer: function, function: rewards.length:score}",
        "{scorer: reward_model, reward_model: data/reward, pairs: all}",
        "{scorer: none, pattern: '(a)', function: 'a:b'}",  # left there for another day
    ],
)
def test_what_a_scorer_needs_is_enough(section):
    load_params(DEFAULT, [f"sample={section}"])


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("sample.scorer=maths", ["sample.scorer", "'math'", "'maths'"]),
        ("sample.n=1", ["sample.n", "greater than or equal to 2", "1"]),
        ("sample.temperature=0.0", ["sample.temperature", "greater than 0"]),
        ("sample.temperature=.inf", ["sample.temperature", "finite"]),
        ("sample.top_p=0.0", ["sample.top_p", "greater than 0"]),
        ("sample.top_p=1.1", ["sample.top_p", "less than or equal to 1"]),
        ("sample.prompts=-1", ["sample.prompts", "greater than or equal to 0"]),
        ("sample.min_gap=-0.1", ["sample.min_gap", "greater than or equal to 0"]),
        ("sample.pairs=best", ["sample.pairs", "'max_min', 'best_vs_random' or 'all'", "'best'"]),
        ("sample.scorer=regex", ["scorer: regex needs sample.pattern", "found None"]),
        ("sample.scorer=function", ["scorer: function needs sample.function", "package.module:name", "found None"]),
        ("sample.scorer=reward_model", ["scorer: reward_model needs sample.reward_model", "folder", "found None"]),
        ("sample.pattern='(a'", ["sample.pattern", "'(a' is no regular expression", "unterminated"]),
        ("sample.pattern='a'", ["sample.pattern", "exactly one group", "found 0"]),
        ("sample.pattern='(a)(b)'", ["sample.pattern", "exactly one group", "found 2", "(?:...)"]),
        ("sample.function=rewards.score", ["sample.function", "package.module:name", "'rewards.score'"]),
        ("sample.function='rewards:score:x'", ["sample.function", "'rewards:score:x'"]),
        ("sample.samples=4", ["sample.samples", "unknown key"]),
    ],
)
def test_mistakes_name_key_value_and_what_is_allowed(override, expected):
    with pytest.raises(RequestError) as caught:
        load_params(DEFAULT, [override])
    for part in expected:
        assert part in str(caught.value)
