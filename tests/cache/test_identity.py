import hashlib
import json

import pytest

from cache import CacheCorrupt, CacheMismatch, ReferenceIdentity
from cache.identity import identity_digest, require_identity
from tests.cache.rows import identity

FIELDS = ["weights", "config", "adapter", "dtype", "quantization", "engine", "engine_version"]


def test_the_reference_id_follows_the_documented_layout():
    present = {name: value for name, value in identity().to_dict().items() if value is not None}
    canonical = json.dumps(present, sort_keys=True, separators=(",", ":")).encode()
    expected = hashlib.blake2b(canonical, digest_size=16, person=b"refcache").hexdigest()
    assert identity().reference_id == expected == "b1b2783026b57ffbcdf78d1c8e419f27"


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_changes_the_reference_id_and_is_named_as_the_difference(field):
    other = identity(**{field: "other"})
    assert other.reference_id != identity().reference_id
    assert identity().differences(other) == {field: (identity().to_dict()[field], "other")}


def test_an_optional_field_added_later_keeps_the_ids_of_references_without_it():
    assert identity_digest(identity().to_dict() | {"added_later": None}) == identity().reference_id


def test_an_identity_survives_the_round_trip():
    assert ReferenceIdentity.from_dict(identity(adapter="c3").to_dict()) == identity(adapter="c3")


def test_a_mismatch_names_fields_both_values_consequence_and_remedy(tmp_path):
    with pytest.raises(CacheMismatch) as raised:
        require_identity(tmp_path, identity(), identity(weights="d4" * 32, adapter="e5" * 32, dtype="bfloat16"))
    message = str(raised.value)
    assert "weights: found a1a1a1a1a1a1, expected d4d4d4d4d4d4\n" in message
    assert "adapter: found none, expected e5e5e5e5e5e5\n" in message
    assert "dtype: found float32, expected bfloat16\n" in message
    assert str(tmp_path) in message and "Rewards would be measured" in message and "dvc repro score" in message
    assert "engine" not in message


def test_an_identity_of_a_newer_version_asks_for_an_upgrade():
    with pytest.raises(CacheMismatch, match=r"\['rope_scaling'\].*upgrade"):
        ReferenceIdentity.from_dict(identity().to_dict() | {"rope_scaling": "yarn"})


@pytest.mark.parametrize("damage", [{"weights": 7}, {"dtype": ["float32"]}])
def test_a_malformed_identity_is_corrupt(damage):
    with pytest.raises(CacheCorrupt, match=next(iter(damage))):
        ReferenceIdentity.from_dict(identity().to_dict() | damage)
    with pytest.raises(CacheCorrupt, match="engine"):
        ReferenceIdentity.from_dict({"weights": "a1"})
