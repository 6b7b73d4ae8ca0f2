"""Two responses and a column that says which is better: by a label, a sign, or a column's name."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from pipeline.params import ColumnNames, PreferredParams
from pipeline.published.rows import BadForm, PairRow, asked


class Published(NamedTuple):
    """A set's own columns; the meanings are those of its publisher's card."""

    rule: PreferredParams
    prompt: str | None = None  # its column, where it has an unusual name

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.rule.column, self.rule.a, self.rule.b)


SIGNED: dict[str, Any] = {"a_wins": "negative", "b_wins": "positive"}
PUBLISHED = {
    # stanfordnlp/SHP: labels is 1 where A is preferred
    "shp": Published(
        PreferredParams(
            column="labels",
            a="human_ref_A",
            b="human_ref_B",
            a_wins=[1],
            b_wins=[0],
            a_reward="score_A",
            b_reward="score_B",
        ),
        "history",
    ),
    # nvidia/HelpSteer2 and 3: from -3, the first is much better, to 3, the second is
    "helpsteer2": Published(PreferredParams(column="preference_strength", a="response_1", b="response_2", **SIGNED)),
    "helpsteer3": Published(
        PreferredParams(column="overall_preference", a="response1", b="response2", **SIGNED), "context"
    ),
    # PKU-Alignment/PKU-SafeRLHF
    "pku_saferlhf": Published(
        PreferredParams(column="better_response_id", a="response_0", b="response_1", a_wins=[0], b_wins=[1])
    ),
    # lmsys/chatbot_arena_conversations, lmarena-ai/arena-human-preference-*
    "arena": Published(
        PreferredParams(column="winner", a="conversation_a", b="conversation_b", a_wins=["model_a"], b_wins=["model_b"])
    ),
}
ARENA_55K = ("prompt", "response_a", "response_b", "winner_model_a", "winner_model_b", "winner_tie")


def by_rule(
    values: Mapping[str, Any], columns: ColumnNames, rule: PreferredParams, *, prompt: str | None = None
) -> tuple[PairRow | None, set[str]]:
    """The pair (None for a tie) and the columns that were used. Raises BadForm."""
    missing = [name for name in (rule.column, rule.a, rule.b) if name not in values]
    if missing:
        found = ", ".join(map(repr, values))
        raise BadForm(f"no column {missing[0]!r}, which prepare.preferred names (found {found})")
    used = {name for name in (rule.column, rule.a, rule.b, rule.a_reward, rule.b_reward) if name is not None}
    side = _winner(values[rule.column], rule)
    if side is None:
        return None, used
    a, b = values[rule.a], values[rule.b]
    rewards = [values.get(name) if name else None for name in (rule.a_reward, rule.b_reward)]
    if side == "b":
        a, b, rewards = b, a, rewards[::-1]
    return PairRow(asked(values, columns, a, prompt=prompt), a, b, *rewards), used


def _winner(value: Any, rule: PreferredParams) -> str | None:
    label = _plain(value)
    for side in ("a", "b"):
        if label in [_plain(wins) for wins in rule.values(side)]:
            return side
    if label in [_plain(tie) for tie in rule.ties]:
        return None
    if isinstance(rule.a_wins, str):
        if isinstance(label, float) and label == label:
            return None if label == 0 else "a" if (label < 0) == (rule.a_wins == "negative") else "b"
        expected = "a number"
    else:
        expected = f"one of {rule.values('a')} ({rule.a}), {rule.values('b')} ({rule.b}) or a tie of {rule.ties}"
    raise BadForm(f"{rule.column} is {value!r}, expected {expected}; see prepare.preferred")


def _plain(value: Any) -> Any:
    """Numbers, also as text of CSV, as floats; whatever else as it is."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


def arena_55k(values: Mapping[str, Any], columns: ColumnNames) -> PairRow | None:
    """lmsys/lmsys-arena-human-preference-55k: turns as JSON lists of texts, a column per outcome. None for a tie."""
    texts = [_turns(values[name], name) for name in ARENA_55K[:3]]
    won = [_plain(values[name]) for name in ARENA_55K[3:]]
    if sorted(won) != [0.0, 0.0, 1.0]:
        raise BadForm(f"{', '.join(ARENA_55K[3:])} are {won}, expected a single 1")
    if won[2]:
        return None
    a, b = (_dialogue(texts[0], answers) for answers in texts[1:])
    found = asked(values, columns, a, prompt=ARENA_55K[0])._replace(prompt=None)
    return PairRow(found, a, b) if won[0] else PairRow(found, b, a)


def _turns(value: Any, name: str) -> list[Any]:
    try:
        turns = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        turns = None
    if not isinstance(turns, list):
        raise BadForm(f"{name} is no JSON list of texts")
    return turns


def _dialogue(prompts: list[Any], answers: list[Any]) -> list[dict[str, Any]]:
    if len(prompts) != len(answers):
        raise BadForm(f"{len(prompts)} prompts have {len(answers)} answers")
    pairs = zip(prompts, answers, strict=True)
    return [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
