"""Long prompts of chats lose the beginning of what was said, never the frame that the template puts around it."""

import pytest

from pipeline.encoding.dialogues import Message
from pipeline.encoding.encoder import Encoded, Encoder, Limits, Unusable
from pipeline.encoding.shortening import shortened
from tests.pipeline.data import chat_tokenizers

SYSTEM, FIRST = Message("system", "Be brief."), Message("user", "abcdefgh")
SAID, LAST = Message("assistant", "ijkl"), Message("user", "mnopqrst")
DIALOGUE = (SYSTEM, FIRST, SAID, LAST)


def fits(most: int):
    """Within so many characters, and two for each turn, as a template's frame takes tokens."""
    return lambda messages: sum(2 + len(message.content) for message in messages) <= most


@pytest.mark.parametrize(
    ("most", "kept"),
    [
        (37, (SYSTEM, FIRST, SAID, LAST)),
        (36, (SYSTEM, FIRST._replace(content="bcdefgh"), SAID, LAST)),
        (29, (SYSTEM, FIRST._replace(content=""), SAID, LAST)),
        (28, (SYSTEM, LAST)),
        (20, (SYSTEM, LAST._replace(content="nopqrst"))),
        (13, (SYSTEM, LAST._replace(content=""))),
        (12, None),
    ],
)
def test_the_oldest_turns_go_first_and_no_more_than_need_be(most, kept):
    assert shortened(DIALOGUE, fits(most)) == kept


def test_what_is_kept_begins_with_a_user():
    opening = (Message("assistant", "Hello!"), FIRST, SAID, LAST)
    assert shortened(opening, fits(30)) == (Message("assistant", "o!"), FIRST, SAID, LAST)
    assert shortened(opening, fits(24)) == (FIRST._replace(content="cdefgh"), SAID, LAST)


@pytest.mark.parametrize("family", ["llama3", "chatml"])
@pytest.mark.parametrize("most", [60, 90, 120, 200])
def test_the_template_frames_what_is_left_as_it_frames_everything(family, most):
    tokenizer = getattr(chat_tokenizers, family)()
    limits = Limits(max_tokens=400, max_prompt_tokens=most, long_prompts="truncate_left")
    long = (SYSTEM, Message("user", "Q" * 300), SAID, Message("user", "Z" * 100 + "?"))
    one, other = Encoder(tokenizer, chat=True, limits=limits).encode([(long, "yes"), (long, "no")])
    assert isinstance(one, Encoded) and isinstance(other, Encoded) and one.prompt_truncated
    assert one.prompt_ids.tolist() == other.prompt_ids.tolist() and len(one.prompt_ids) <= most
    text = tokenizer.decode(one.prompt_ids)
    kept = text.count("Z")
    messages = [SYSTEM._asdict(), {"role": "user", "content": "Z" * kept + "?"}]
    if "Q" in text:
        messages[1:1] = [{"role": "user", "content": "Q" * text.count("Q")}, SAID._asdict()]
    assert text == tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert len(one.prompt_ids) == most  # a byte is a token here, so nothing was cut needlessly


def test_a_prompt_whose_frame_alone_is_too_long_is_dropped():
    limits = Limits(max_tokens=400, max_prompt_tokens=5, long_prompts="truncate_left")
    (found,) = Encoder(chat_tokenizers.llama3(), chat=True, limits=limits).encode([((LAST,), "yes")])
    assert isinstance(found, Unusable) and found.prompt_too_long and "also without its contents" in found.reason


def test_a_developers_turn_stays_as_a_systems_does():
    developer = Message("developer", "Be brief.")
    assert shortened((developer, FIRST, SAID, LAST), fits(28)) == (developer, LAST)


def test_plain_text_without_room_behind_its_opening_is_dropped():
    limits = Limits(max_tokens=20, max_prompt_tokens=1, long_prompts="truncate_left")
    (found,) = Encoder(chat_tokenizers.plain_that_frames_prompts(), chat=False, limits=limits).encode([("12", "9")])
    assert isinstance(found, Unusable) and found.prompt_too_long


def test_plain_text_keeps_what_the_tokenizer_opens_with():
    tokenizer = chat_tokenizers.plain_that_frames_prompts()
    limits = Limits(max_tokens=20, max_prompt_tokens=5, long_prompts="truncate_left")
    (cut,) = Encoder(tokenizer, chat=False, limits=limits).encode([("12345678", "9")])
    assert tokenizer.decode(cut.prompt_ids) == "<s>5678" and cut.prompt_truncated
    own = "<s><s><s>78"  # special tokens of the text itself are no opening
    (cut,) = Encoder(tokenizer, chat=False, limits=limits).encode([(own + "9" * 4, "9")])
    assert tokenizer.decode(cut.prompt_ids) == "<s>9999"
