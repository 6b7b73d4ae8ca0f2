"""YAML that the documentation shows for params.yaml is what the strict sections take, and so is every dotted name."""

import re
from copy import deepcopy
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import pytest
from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML

from pipeline.params import Params, ScoreParams, TrainParams
from tests import ROOT
from tests.docs import CURRENT, blocks, inline_code

PARAMS = YAML(typ="safe").load((ROOT / "params.yaml").read_text())
FILE_ENDINGS = {"json", "jsonl", "md", "py", "parquet", "tsv", "yaml", "log"}


def shown() -> list[tuple[str, dict[str, Any]]]:
    """(where, sections) of the blocks that are parts of params.yaml; `...` in them stands for the keys left out."""
    found = [(str(block), YAML(typ="safe").load(block.text)) for block in blocks("yaml")]
    return [(where, sections) for where, sections in found if set(sections) & set(Params.model_fields)]


def merged(base: Any, over: Any) -> Any:
    if not (isinstance(base, dict) and isinstance(over, dict)):
        return over
    return {**base, **{key: merged(base.get(key), value) for key, value in over.items() if key != "..."}}


def test_blocks_are_found():
    assert len(shown()) > 8


@pytest.mark.parametrize(("where", "sections"), shown(), ids=lambda value: value if isinstance(value, str) else "")
def test_every_block_of_yaml_is_allowed_in_params_yaml(where, sections):
    try:
        Params.model_validate(merged(deepcopy(PARAMS), sections))
    except ValidationError as error:
        # Sections that must agree are another page's business: a block shows one of them.
        assert all(not problem["loc"] for problem in error.errors()), f"{where}: {error}"


def options() -> dict[str, dict[str, Any]]:
    """{section: {name: default}} of the tables that begin with `SECTION.` and `default`."""
    table = re.compile(r"^\| `(\w+)\.` \| default \|.*\n.*\n((?:\|.*\n)+)", re.MULTILINE)
    row = re.compile(r"^\| `(\w+)` \| ([^|]+?) \|", re.MULTILINE)
    tables = [match for page in CURRENT for match in table.findall(page.read_text())]
    return {
        section: {name: YAML(typ="safe").load(value) for name, value in row.findall(rows)} for section, rows in tables
    }


@pytest.mark.parametrize(("section", "model"), [("score", ScoreParams), ("train", TrainParams)])
def test_tables_of_options_have_every_one_with_its_default(section, model):
    fields = {name: field for name, field in model.model_fields.items() if not field.is_required()}
    defaults = {name: field.get_default(call_default_factory=True) for name, field in fields.items()}
    plain = {name: value.model_dump() if isinstance(value, BaseModel) else value for name, value in defaults.items()}
    assert options()[section] == plain


def kinds(annotation: Any) -> list[Any]:
    """The types that a value may have, out of unions, annotations and type aliases."""
    annotation = getattr(annotation, "__value__", annotation)
    if get_origin(annotation) is Annotated:
        return kinds(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [kind for part in get_args(annotation) for kind in kinds(part)]
    return [annotation]


def has(kind: Any, path: list[str]) -> bool:
    if not path or kind is Any:
        return True
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        field = kind.model_fields.get(path[0])
        return field is not None and any(has(inner, path[1:]) for inner in kinds(field.annotation))
    if get_origin(kind) is dict:  # a name of the user's own: train.variants.dpo.beta
        return any(has(inner, path[1:]) for inner in kinds(get_args(kind)[1]))
    return False


def names(kind: Any, path: str = "") -> set[str]:
    """All keys of a section and of what lies in it, dotted."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        found = {f"{path}.{name}": field.annotation for name, field in kind.model_fields.items()}
        return set(found).union(*(names(inner, name) for name, part in found.items() for inner in kinds(part)))
    return (
        set().union(*(names(inner, path) for inner in kinds(get_args(kind)[1]))) if get_origin(kind) is dict else set()
    )


def test_every_parameter_is_explained_somewhere():
    texts = [ROOT / "params.yaml", *(page for page in CURRENT if page.parts[-2] in ("docs", "input"))]
    words = set(re.findall(r"\w+", "\n".join(text.read_text() for text in texts)))
    found = names(Params)
    assert len(found) > 150
    assert not sorted(name for name in found if name.rpartition(".")[2] not in words)


def dotted() -> list[tuple[str, str]]:
    name = re.compile(rf"({'|'.join(Params.model_fields)})((?:\.[a-z_<>0-9]+)+)(?=$|[:=,\s])")
    found = [
        (str(page.relative_to(ROOT)), match.group())
        for page in CURRENT
        for code in inline_code(page)
        for match in [name.match(code)]
        if match and match.group().rpartition(".")[2] not in FILE_ENDINGS
    ]
    return sorted(set(found))


@pytest.mark.parametrize(("where", "name"), dotted())
def test_every_parameter_that_is_named_with_its_section_exists(where, name):
    assert has(Params, name.split(".")), f"{where}: params.yaml takes no {name}"


def test_names_are_told_apart():
    assert has(Params, ["train", "variants", "dpo", "beta"]) and has(Params, ["prepare", "ranked", "min_gap"])
    assert not has(Params, ["train", "epoch"]) and not has(Params, ["score", "engines", "count"])
