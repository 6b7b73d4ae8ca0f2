"""Which sketches a training may read: those of this very model and `trainable`, with every response; and its stamp."""

import dataclasses
import json

import polars as pl
import pytest

from cache import CacheIncomplete, CacheMismatch, SketchIdentity, publish_reference
from cache.sketches import canonical_json
from pipeline.auxdpo.requirements import open_fitting, require_responses, write_stamp
from pipeline.errors import RequestError
from pipeline.params import Lora, LoraShape
from pipeline.params.objectives import DPO, AuxDPO
from tests.cache.test_sketches import GROUPS, IDENTITY, keys, make_rows

OURS = {"weights": IDENTITY.weights, "config": IDENTITY.config, "trainable": "all"}


def publish(folder, rows=(0, 20), **fields):
    publish_reference(folder, make_rows(*rows), dataclasses.replace(IDENTITY, **fields))
    return folder


def publish_none(folder):
    none = SketchIdentity(mode="none")
    publish_reference(folder, none.kind.schema.empty_table(), none)
    return folder


def pairs(*numbers):
    chosen, rejected = ([keys(n, n + 1)[0] for n in side] for side in zip(*numbers, strict=True))
    return pl.DataFrame({"chosen_key": chosen, "rejected_key": rejected})


def auxdpo(**fields):
    return AuxDPO(objective="auxdpo", **fields)


def test_sketches_of_this_model_and_trainable_are_taken_whatever_their_k_seed_and_mode(tmp_path):
    for n, fields in enumerate([{}, {"seed": 7}, {"mode": "exact", "k": None}, {"dtype": "bfloat16"}]):
        assert open_fitting(publish(tmp_path / str(n), **fields), **OURS).n_rows == 20


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("weights", "c3" * 16, "weights: found c3c3c3c3c3c3, expected a1a1a1a1a1a1"),
        ("config", "c3" * 16, "config: found c3c3c3c3c3c3, expected b2b2b2b2b2b2"),
        ("trainable", '"head"', 'trainable: found "head", expected "all"'),
    ],
)
def test_sketches_of_something_else_are_refused_with_both_values_and_what_to_run(tmp_path, field, value, said):
    with pytest.raises(CacheMismatch, match=f"{said}\n.*dvc repro sketch"):
        open_fitting(publish(tmp_path / "sketches", **{field: value}), **OURS)


def test_a_lora_of_another_seed_is_another_trainable(tmp_path):
    first, second = (Lora(lora=LoraShape(r=2, seed=seed)) for seed in (0, 1))
    folder = publish(tmp_path / "sketches", trainable=canonical_json(first.model_dump()))
    assert open_fitting(folder, **OURS | {"trainable": first}).n_rows == 20
    with pytest.raises(CacheMismatch, match=r'"seed":0.*expected.*"seed":1'):
        open_fitting(folder, **OURS | {"trainable": second})


def test_sketches_of_the_head_by_the_engine_are_taken_where_the_head_alone_trains(tmp_path):
    head = publish(tmp_path / "head", source="engine", trainable='"head"')
    assert open_fitting(head, **OURS | {"trainable": "head"}).n_rows == 20
    part = publish(tmp_path / "part", source="engine", trainable='{"head_part":"model.embed_tokens.weight"}')
    for folder, trainable, said in ((head, "all", '"head"'), (part, "head", "model.embed_tokens.weight")):
        with pytest.raises(RequestError, match=rf'{said}.*trainable is "{trainable}".*source: gradient.*repro sketch'):
            open_fitting(folder, **OURS | {"trainable": trainable})


def test_no_sketches_are_refused_saying_what_to_set(tmp_path):
    with pytest.raises(RequestError, match="--sketches"):
        open_fitting(None, **OURS)
    with pytest.raises(CacheIncomplete, match="does not exist"):
        open_fitting(tmp_path / "nothing", **OURS)
    with pytest.raises(RequestError, match=r"holds no sketches.*sketch\.mode: tensorsketch.*dvc repro sketch"):
        open_fitting(publish_none(tmp_path / "none"), **OURS)


def test_every_response_of_a_pair_must_be_sketched(tmp_path):
    sketches = open_fitting(publish(tmp_path / "sketches"), **OURS)
    require_responses(sketches, pairs((0, 1), (19, 1)), auxdpo())
    with pytest.raises(CacheIncomplete, match=r"lacks 2 of the 3 responses.*dvc repro sketch"):
        require_responses(sketches, pairs((0, 20), (21, 20)), auxdpo())


def test_a_projection_that_leaves_only_zero_is_refused_before_training(tmp_path):
    sketches = open_fitting(publish(tmp_path / "sketches"), **OURS)
    few = pairs((0, 1), (2, 3))
    require_responses(sketches, few, auxdpo(rank=4))  # not read
    require_responses(sketches, few, auxdpo(constraint="projection", rank=3))
    with pytest.raises(RequestError, match="leaves no offset but zero, since there are only 4 responses"):
        require_responses(sketches, few, auxdpo(constraint="projection", rank=4))
    width = sum(GROUPS.values())
    many = open_fitting(publish(tmp_path / "many", (0, 40)), **OURS)
    with pytest.raises(RequestError, match=rf"1\.\.{width}, the numbers of a sketch, found {width + 1}"):
        require_responses(
            many, pairs(*zip(range(20), range(20, 40), strict=True)), auxdpo(constraint="projection", rank=width + 1)
        )


class TestStamp:
    def test_it_changes_with_the_sketches_for_variants_that_read_them_alone(self, tmp_path):
        folder, out = tmp_path / "sketches", tmp_path / "stamps/x.json"
        stamps = {}
        for rows in ((0, 10), (0, 12)):
            publish(folder, rows)
            for variant in (auxdpo(), DPO(objective="dpo")):
                write_stamp("x", variant, folder, out)
                stamps[variant.objective, rows] = out.read_text()
        assert stamps["dpo", (0, 10)] == stamps["dpo", (0, 12)]
        assert json.loads(stamps["dpo", (0, 10)])["sketches"] is None
        assert stamps["auxdpo", (0, 10)] != stamps["auxdpo", (0, 12)]

    def test_a_variant_that_needs_sketches_is_refused_without(self, tmp_path):
        folder = publish_none(tmp_path / "none")
        write_stamp("dpo", DPO(objective="dpo"), folder, tmp_path / "dpo.json")
        with pytest.raises(RequestError, match=r"variant aux \(auxdpo\) needs.*sketch\.mode"):
            write_stamp("aux", auxdpo(), folder, tmp_path / "aux.json")
        assert not (tmp_path / "aux.json").exists()
