"""The embedded dataset: small tasks whose true reward is known, so that evaluation can measure it.

Every prompt is one task; candidate responses differ in correctness, format and length, and preferences between them are
drawn from the Bradley-Terry model on `true_reward`. Every prompt has its own random numbers, made from the seed and its
place, so asking for more prompts or sft rows keeps those there were.
"""

import math
import random
import re
from collections.abc import Callable, Iterator
from itertools import combinations
from typing import NamedTuple, TypeVar

from pipeline.data.splitting import share_of
from pipeline.errors import RequestError
from pipeline.params import DemoParams
from pipeline.published.files import Row

MIN_REWARD, MAX_REWARD = -1.0, 3.0
MAX_PAIRS_PER_PROMPT = 6
FREE_WORDS = 10  # words a response may have before length costs reward

_SFT_SHARE = 0.7  # of all possible tasks; pairs take theirs from the others
_MAX_DRAWS = 3000  # tasks drawn in vain before giving up


T = TypeVar("T")


class _Draws:
    """Random numbers from names. Uses random() alone: the one method whose values Python keeps between versions."""

    def __init__(self, *names: object) -> None:
        self._source = random.Random(" ".join(map(str, names)))

    def chance(self, probability: float) -> bool:
        return self._source.random() < probability

    def below(self, n: int) -> int:
        return int(self._source.random() * n)

    def weighted(self, weights: dict[str, float]) -> str:
        left = self._source.random() * sum(weights.values())
        for name, weight in weights.items():
            left -= weight
            if left < 0:
                return name
        return next(reversed(weights))

    def shuffled(self, items: list[T]) -> list[T]:
        return [items[place] for _, place in sorted((self._source.random(), place) for place in range(len(items)))]


# tasks and their reward -----------------------------------------------------------------------------------------------


class Task(NamedTuple):
    category: str
    answer: str  # digits, or letters with a space between them so that each is one token
    working: str  # what a response may show before its answer; {} stands for the answer it gives


_PROMPTS: dict[str, str] = {  # category -> pattern of the prompt
    "addition": r"Compute (\d+) \+ (\d+)\.",
    "subtraction": r"Compute (\d+) - (\d+)\.",
    "largest": r"Largest of (\d+), (\d+), (\d+), (\d+)\?",
    "reversal": r"Reverse ([a-z](?: [a-z])+)\.",
    "sorting": r"Sort ([a-z](?: [a-z])+)\.",
}
_SOLUTIONS: dict[str, Callable[..., tuple[str, str]]] = {  # category -> (answer, working)
    "addition": lambda a, b: (str(int(a) + int(b)), f"{a} + {b} = {{}}."),
    "subtraction": lambda a, b: (str(int(a) - int(b)), f"{a} - {b} = {{}}."),
    "largest": lambda *numbers: (max(numbers, key=int), "The largest is {}."),
    "reversal": lambda letters: (letters[::-1], "Backwards: {}."),
    "sorting": lambda letters: (" ".join(sorted(letters.split())), "In order: {}."),
}
_NUMBER = re.compile(r"-?\d+")
_WORD = re.compile(r"(?<![a-z])[a-z](?: [a-z])*(?![a-z])")


def solve(prompt_text: str) -> Task:
    """The task that a demo prompt poses. Raises ValueError for any other text."""
    for category, pattern in _PROMPTS.items():
        match = re.fullmatch(pattern, prompt_text.strip())
        if match:
            return Task(category, *_SOLUTIONS[category](*match.groups()))
    raise ValueError(f"not a prompt of the demo dataset: {prompt_text[:80]!r}")


def true_reward(prompt_text: str, response_text: str) -> float:
    """r* = 2 * correctness + format - length, in [-1, 3]; defined for every response text, also empty ones.

    correctness: 1 for the right answer. Otherwise up to 0.5: for a number 0.5 * max(0, 1 - |error| / 10), for letters
      0.5 * the share of places that hold the right letter; 0 where no answer is found. The answer is the number or
      letters right after the last "Answer:", or without that mark the last number or letters of the text.
    format: 1 if "Answer:" occurs once and the text ends with the answer after it (a full stop may follow), else 0.
    length: 0 up to FREE_WORDS words, then 0.1 for each word more, at most 1.
    prompt_text: the user's text, as `prompt_text` of the prepared files has it. Raises ValueError for other prompts.
    """
    task = solve(prompt_text)
    form = _NUMBER if _is_number(task.answer) else _WORD
    before, mark, after = response_text.rpartition("Answer:")
    found = form.match(after.lstrip()) if mark else None
    clean = found is not None and "Answer:" not in before and after.lstrip()[found.end() :].strip() in ("", ".")
    answer = found.group() if found else "" if mark else next(iter(form.findall(response_text)[-1:]), "")
    extra_words = len(response_text.split()) - FREE_WORDS
    return 2 * _correctness(task.answer, answer) + float(clean) - min(max(extra_words, 0) / 10, 1.0)


def _is_number(answer: str) -> bool:
    return answer[-1].isdigit()


def _correctness(expected: str, found: str) -> float:
    if found == expected:
        return 1.0
    if not found:
        return 0.0
    if _is_number(expected):
        # A policy may write any number of digits; int() of thousands of them is refused by Python, and is wrong anyway.
        return 0.5 * max(0.0, 1 - abs(int(found) - int(expected)) / 10) if len(found) < 10 else 0.0
    right, given = expected.split(), found.split()
    return 0.5 * sum(a == b for a, b in zip(right, given, strict=False)) / max(len(right), len(given))


# what is drawn --------------------------------------------------------------------------------------------------------


def _draw_prompt(draws: _Draws, category: str) -> str:
    if category in ("reversal", "sorting"):
        letters = " ".join("abcdefghij"[draws.below(10)] for _ in range(4))
        return f"{'Reverse' if category == 'reversal' else 'Sort'} {letters}."
    if category == "largest":
        return "Largest of {}, {}, {}, {}?".format(*(draws.below(10) for _ in range(4)))
    if category == "addition":
        return f"Compute {draws.below(100)} + {draws.below(20)}."
    return f"Compute {20 + draws.below(80)} - {draws.below(20)}."


def _draw_answer(draws: _Draws, task: Task) -> str:
    """Right about half of the time; else near the answer, or for a third of the errors anything of the right kind."""
    if draws.chance(0.5):
        return task.answer
    near = draws.chance(0.67)
    if _is_number(task.answer):
        top = 10 if task.category == "largest" else 100
        return str(abs(int(task.answer) + draws.below(9) - 4) if near else draws.below(top))
    letters = task.answer.split()
    if not near:
        return " ".join(draws.shuffled(letters))
    place = draws.below(len(letters) - 1)
    letters[place : place + 2] = letters[place + 1], letters[place]
    return " ".join(letters)


_STYLES = {"short": 0.3, "working": 0.3, "bare": 0.15, "talkative": 0.15, "trailing": 0.1}


def draw_response(draws: _Draws, prompt_text: str) -> str:
    """One candidate; pairs and sft rows draw from this same distribution."""
    task = solve(prompt_text)
    answer = _draw_answer(draws, task)
    style = draws.weighted(_STYLES)
    if style == "short":
        return f"Answer: {answer}"
    if style == "working":
        return f"{task.working.format(answer)} Answer: {answer}"
    if style == "bare":
        return answer
    if style == "talkative":
        return f"Let me think about it for a moment, I would say {answer}. Answer: {answer}"
    return f"Answer: {answer}. I hope this helps!"


def preference_probability(reward: float, other: float) -> float:
    """Bradley-Terry: the probability that the first response is preferred, sigmoid(r* - r*')."""
    return 1 / (1 + math.exp(other - reward))


def _draw_preferences(draws: _Draws, prompt_text: str) -> Iterator[tuple[str, str]]:
    """1 to MAX_PAIRS_PER_PROMPT (chosen, rejected) over 2 to 5 candidates, so pairs of a prompt share responses."""
    wanted = 2 + draws.below(4)
    candidates: list[str] = []
    while len(candidates) < wanted:
        response = draw_response(draws, prompt_text)
        if response not in candidates:
            candidates.append(response)
    pairs = draws.shuffled(list(combinations(candidates, 2)))
    for first, second in pairs[: 1 + draws.below(min(len(pairs), MAX_PAIRS_PER_PROMPT))]:
        rewards = true_reward(prompt_text, first), true_reward(prompt_text, second)
        yield (first, second) if draws.chance(preference_probability(*rewards)) else (second, first)


def _prompts(params: DemoParams, count: int, *, sft: bool) -> Iterator[str]:
    """`count` distinct prompts, categories in turn; sft rows and pairs never share one."""
    names = list(_PROMPTS)
    seen: set[str] = set()
    for number in range(count):
        draws = _Draws(params.seed, "sft" if sft else "pairs", "prompt", number)
        for _ in range(_MAX_DRAWS):
            prompt = _draw_prompt(draws, names[number % len(names)])
            is_sft = share_of(prompt, seed=params.seed, purpose="demo") < _SFT_SHARE
            if is_sft == sft and prompt not in seen:
                break
        else:
            option = "prepare.demo.sft_rows" if sft else "prepare.demo.prompts"
            raise RequestError(f"{option} is {count}, but the demo has only about {number} distinct prompts for it.")
        seen.add(prompt)
        yield prompt


def demo_rows(params: DemoParams) -> Iterator[Row]:
    """One row per pair: prompt, chosen, rejected, category, chosen_reward, rejected_reward; from "demo[0]" on."""
    number = 0
    for place, prompt in enumerate(_prompts(params, params.prompts, sft=False)):
        for chosen, rejected in _draw_preferences(_Draws(params.seed, "pairs", "responses", place), prompt):
            values = {
                "prompt": prompt,
                "chosen": chosen,
                "rejected": rejected,
                "category": solve(prompt).category,
                "chosen_reward": true_reward(prompt, chosen),
                "rejected_reward": true_reward(prompt, rejected),
            }
            yield Row(f"demo[{number}]", values)
            number += 1


def demo_sft_rows(params: DemoParams) -> Iterator[Row]:
    """One row per other prompt of the same kinds: prompt and completion, one draw of the candidates' distribution."""
    for place, prompt in enumerate(_prompts(params, params.sft_rows, sft=True)):
        completion = draw_response(_Draws(params.seed, "sft", "response", place), prompt)
        yield Row(f"demo-sft[{place}]", {"prompt": prompt, "completion": completion})
