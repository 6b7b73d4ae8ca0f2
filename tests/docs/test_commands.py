"""Every command and option that the documentation names exists, and what it sets is allowed."""

import re
from functools import cache
from pathlib import Path

import click
import pytest
from ruamel.yaml import YAML

from pipeline.params import load_params
from stages.__main__ import COMMANDS, main
from tests import ROOT
from tests.docs import CURRENT, blocks, inline_code

OURS = re.compile(r"(?:\brefcache|-m stages) +([a-z][a-z-]*|--?[a-z]+)(?![\w./])([^|;&]*)")
DVC = re.compile(r"\bdvc (repro|exp run)\b([^|;&]*)")
VALUE = r"(?:'([^']*)'|(\S+))"


def shell_lines() -> list[tuple[str, str]]:
    """(where, line) of shell blocks and inline code; continued lines joined; no comments, no packages."""
    texts = [(str(block), block.text) for block in blocks("sh", "bash")]
    texts += [(str(page.relative_to(ROOT)), code) for page in CURRENT for code in inline_code(page)]
    joined = [(where, text.replace("\\\n", " ").splitlines()) for where, text in texts]
    not_ours = r"(^|\s)#.*|\bpip install [^&;|]*"
    return [(where, re.sub(not_ours, "", line)) for where, lines in joined for line in lines]


def uses(expression: re.Pattern[str]) -> list[tuple[str, str, str]]:
    """(where, what the first group found, the rest of the command)."""
    found = [(where, match) for where, line in shell_lines() for match in expression.finditer(line)]
    return sorted({(where, match.group(1), match.group(2)) for where, match in found})


def overrides(option: str, words: str) -> list[str]:
    return [quoted or bare for quoted, bare in re.findall(rf"{option}[ =]{VALUE}", words) if "=" in (quoted or bare)]


def options_of(name: str) -> set[str]:
    command = main.get_command(click.Context(main), name)
    assert command
    return {text for option in command.params for text in (*option.opts, *option.secondary_opts)} | {"--help", "-h"}


@cache
def stages_of(path: Path) -> dict:
    return YAML(typ="safe").load(path.read_text())["stages"]


def test_commands_are_found_in_blocks_continued_lines_and_sentences():
    found = uses(OURS)
    assert {name for _, name, _ in found} >= {"score", "train", "inspect", "verify", "gc", "why-miss", "sketch-report"}
    assert any("--metrics" in words and "--set" in words for where, _, words in found if "sketches.md" in where)
    assert len(uses(DVC)) > 10


@pytest.mark.parametrize(("where", "name", "words"), uses(OURS))
def test_every_command_and_option_of_ours_exists(where, name, words):
    if name.startswith("-"):
        assert name in ("--help", "-h", "--version"), where
        return
    assert name in COMMANDS, f"{where}: no command {name}, only {sorted(COMMANDS)}"
    for option in re.findall(r"(?<=\s)--?[a-z][a-z-]*", words):
        assert option in options_of(name), f"{where}: {name} has no {option}, only {sorted(options_of(name))}"
    load_params(ROOT / "params.yaml", overrides("--set", words))


@pytest.mark.parametrize(("where", "name", "words"), uses(DVC))
def test_what_dvc_is_told_to_run_or_to_set_exists(where, name, words):
    load_params(ROOT / "params.yaml", overrides("-S", words))
    for target in re.sub(rf"-S {VALUE}", "", words).split() if name == "repro" else []:
        file, _, stage = target.rpartition(":")
        if target.startswith("-"):
            assert target in ("--dry", "-f", "-R", "--force"), f"{where}: dvc repro {target}"
        elif "/" in target or target.endswith(".yaml") or (ROOT / target).is_dir():
            known = stages_of(ROOT / file) if stage and file else {}
            assert (ROOT / (file or target)).exists() and (not file or stage.split("@")[0] in known), (
                f"{where}: {target}"
            )
        elif target != "STAGE":
            assert target.split("@")[0] in stages_of(ROOT / "dvc.yaml"), f"{where}: dvc.yaml has no stage {target}"
