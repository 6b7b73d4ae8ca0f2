"""Single responses that are desirable or not, each with a mismatched response for KTO's baseline."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from cache.keys import prompt_key, response_key
from pipeline.data.preferences import Feedback
from pipeline.encoding.dialogues import readable, text_of
from pipeline.encoding.encoder import Encoded, Encoder, Unusable
from pipeline.published.files import BadRow


class EncodedFeedback(NamedTuple):
    feedback: Feedback
    split: str
    response: Encoded
    other: Feedback  # whose response the mismatched one is
    mismatched: Encoded  # that response under this prompt


class Mismatches:
    """Gives every row the response of another prompt, batch after batch.

    The prompts of a batch pass their responses on to the next one in a ring, the first to the first, the second to the
    second, so that where all have equally many, every response serves once, as in TRL 1.16's rotation of a batch; but
    never to its own prompt, as there between the two sides of a pair.
    """

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self.within = 0  # rows whose mismatched response answers the same prompt, for want of another

    def encode(self, rows: Sequence[tuple[Feedback, str, Encoded]]) -> list[EncodedFeedback | BadRow]:
        """One result per row."""
        if not rows:
            return []
        others = self._others([feedback for feedback, _, _ in rows])
        asked = [(feedback.prompt, other.response) for (feedback, _, _), other in zip(rows, others, strict=True)]
        found: list[EncodedFeedback | BadRow] = []
        for row, other, mismatched in zip(rows, others, self._encoder.encode(asked), strict=True):
            if isinstance(mismatched, Unusable):
                found.append(BadRow(row[0].where, f"with the response of {other.where}: {mismatched.reason}"))
            else:
                found.append(EncodedFeedback(*row, other, mismatched))
        return found

    def _others(self, rows: list[Feedback]) -> list[Feedback]:
        by_prompt: dict[Any, list[Feedback]] = {}
        for row in rows:
            by_prompt.setdefault(row.prompt, []).append(row)
        groups = list(by_prompt.values())
        if len(groups) == 1:
            self.within += len(rows)
            return [rows[-1], *rows[:-1]]
        giver = {id(group): giving for group, giving in zip(groups, [groups[-1], *groups[:-1]], strict=True)}
        seen: dict[Any, int] = {}
        others = []
        for row in rows:
            place = seen.get(row.prompt, 0)
            seen[row.prompt] = place + 1
            giving = giver[id(by_prompt[row.prompt])]
            others.append(giving[place % len(giving)])
        return others


def feedback_columns(rows: Sequence[EncodedFeedback]) -> dict[str, Any]:
    """Of FEEDBACK_SCHEMA, without the number."""
    return {
        "split": [row.split for row in rows],
        "prompt_key": [prompt_key(row.response.prompt_ids) for row in rows],
        "response_key": [response_key(row.response.prompt_ids, row.response.response_ids) for row in rows],
        "mismatched_key": [response_key(row.mismatched.prompt_ids, row.mismatched.response_ids) for row in rows],
        "desirable": [row.feedback.desirable for row in rows],
        "category": [row.feedback.category for row in rows],
        "prompt_text": [readable(row.feedback.prompt) for row in rows],
        "response_text": [text_of(row.feedback.response) for row in rows],
        "source": [row.feedback.where for row in rows],
    }
