"""What a row and its messages hold beside role and content reaches the chat template, or the row is bad."""

import polars as pl
import pytest

from pipeline.errors import RequestError
from pipeline.params import ModelParams
from tests.pipeline.data.chat_tokenizers import byte_tokenizer
from tests.pipeline.data.preparing import file_params, prepare_into, write_jsonl

# A turn is [role]content; tools, calls, thoughts and a setting are rendered where they are given.
TEMPLATE = """
{%- if tools -%}[tools]{{ tools | tojson }}{%- endif -%}
{%- for m in messages -%}
{%- if m.role in ['system', 'user', 'tool'] -%}[{{ m.role }}{{ ' ' + m.name if m.name }}]{{ m.content }}
{%- elif m.role == 'assistant' -%}[assistant]
{%- if m.reasoning_content -%}({{ m.reasoning_content }}){%- endif -%}{{ m.content }}
{%- for call in m.tool_calls or [] -%}{call {{ call.function.name }}}{%- endfor -%}<|end|>
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}[assistant]{%- if style -%}({{ style }}){%- endif -%}{%- endif -%}
"""
CALL = [{"type": "function", "function": {"name": "light", "arguments": {"state": "on"}}}]
TOOLS = [{"type": "function", "function": {"name": "light"}}]


def said(role: str, content, **more) -> dict:
    return {"role": role, "content": content} | more


@pytest.fixture
def texts(tmp_path):
    """A function of one row: the decoded tokens of its prompt, chosen and rejected."""
    tokenizer = byte_tokenizer(["<|end|>"], eos="<|end|>", template=TEMPLATE)
    tokenizer.save_pretrained(tmp_path / "model")

    def prepare(row: dict) -> tuple[str, str, str]:
        write_jsonl(tmp_path / "in" / "pairs.jsonl", [row])
        params = file_params(tmp_path / "in", sft={"source": "none"}, test_share=0.0)
        prepare_into(tmp_path / "out", params, ModelParams(name=str(tmp_path / "model")))
        pairs = pl.read_parquet(tmp_path / "out/pairs/pairs.parquet")
        responses = pl.read_parquet(tmp_path / "out/pairs/responses.parquet")
        found = []
        for side in ("chosen", "rejected"):
            [row] = responses.filter(pl.col("response_key") == pairs[f"{side}_key"][0]).to_dicts()
            found.append((tokenizer.decode(row["prompt_ids"]), tokenizer.decode(row["response_ids"])))
        assert found[0][0] == found[1][0]
        return found[0][0], found[0][1], found[1][1]

    return prepare


ASK, YES, NO = said("user", "On?"), [said("assistant", "Yes")], [said("assistant", "No")]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"prompt": [ASK, said("assistant", "", tool_calls=CALL), said("tool", "ok", name="light")], "tools": TOOLS},
            (
                '[tools][{"type": "function", "function": {"name": "light"}}][user]On?'
                "[assistant]{call light}<|end|>[tool light]ok[assistant]",
                "Yes<|end|>",
                "No<|end|>",
            ),
        ),
        (
            {"prompt": [ASK, said("assistant", None, tool_calls=CALL), said("tool", "ok")]},
            ("[user]On?[assistant]{call light}<|end|>[tool]ok[assistant]", "Yes<|end|>", "No<|end|>"),
        ),
        (
            {"prompt": [ASK], "chosen": [said("assistant", "Yes", reasoning_content="It is.")]},
            ("[user]On?[assistant]", "(It is.)Yes<|end|>", "No<|end|>"),
        ),
        (
            {"prompt": [ASK], "chosen": [said("assistant", "", tool_calls=CALL)]},
            ("[user]On?[assistant]", "{call light}<|end|>", "No<|end|>"),
        ),
        (
            {"prompt": [said("user", [{"type": "text", "text": "O"}, {"type": "text", "text": "n?"}])]},
            ("[user]On?[assistant]", "Yes<|end|>", "No<|end|>"),
        ),
        (
            {"prompt": [{"from": "human", "value": "On?"}], "chosen": [{"from": "gpt", "value": "Yes"}]},
            ("[user]On?[assistant]", "Yes<|end|>", "No<|end|>"),
        ),
        (
            {"prompt": [said("System", "Be brief."), said("User", "On?")]},
            ("[system]Be brief.[user]On?[assistant]", "Yes<|end|>", "No<|end|>"),
        ),
        (
            {"prompt": "On?", "tools": '[{"name": "light"}]'},
            ('[tools][{"name": "light"}][user]On?[assistant]', "Yes<|end|>", "No<|end|>"),
        ),
    ],
    ids=[
        "tools and calls",
        "a call without content",
        "thoughts",
        "an answer that calls",
        "parts",
        "from and value",
        "capital roles",
        "tools as JSON",
    ],
)
def test_it_reaches_the_template(texts, row, expected):
    assert texts({"chosen": YES, "rejected": NO} | row) == expected


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {"prompt": [said("developer", "Be brief."), ASK]},
            r"nothing of turn 1, whose role is 'developer'; it renders "
            r"system, user, assistant, tool",
        ),
        (
            {"prompt": [said("user", [{"type": "image", "url": "x"}])]},
            r"message 0 of prompt has parts that are no text \(image\)",
        ),
        ({"prompt": "On?", "tools": "[light"}, "tools is no JSON"),
        ({"prompt": [ASK], "chat_template_kwargs": {"style": "short"}}, "does not begin with its own prompt"),
    ],
)
def test_or_the_row_is_bad_and_says_why(texts, row, reason):
    with pytest.raises(RequestError, match=rf"pairs\.jsonl:1: .*{reason}"):
        texts({"chosen": YES, "rejected": NO} | row)
