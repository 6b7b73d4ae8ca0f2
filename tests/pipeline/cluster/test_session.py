"""What is refused before anything of Ray starts. The rest is in tests/integration/test_ray.py."""

import sys

import pytest

from pipeline.cluster import same_software, session
from pipeline.cluster.same_software import software
from pipeline.cluster.session import Need, RaySession
from pipeline.errors import RequestError
from pipeline.params import RayParams
from pipeline.reference.identity import engine_version

NEED = Need("score", "engines", 2, 1, RayParams())


def test_without_ray_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(session, "find_spec", lambda name: None)
    with pytest.raises(RequestError, match=r"score.workers is ray.*pip install -e \.\[ray\].*score.workers to local"):
        RaySession(NEED, tmp_path, {})


def test_a_ray_client_address_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    with pytest.raises(RequestError, match=r"ray://head:10001.*must run on a node of the cluster"):
        RaySession(NEED, tmp_path, {})
    assert "ray" not in sys.modules or not sys.modules["ray"].is_initialized()


def test_software_is_what_the_identity_says_and_changes_with_any_source_file(tmp_path, monkeypatch):
    assert software()["vllm"] == engine_version()
    copies = []
    for change in ("", "# a comment\n"):
        folder = tmp_path / f"copy{len(copies)}"
        for name in ("cache/keys.py", "pipeline/cluster/same_software.py"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("x = 1\n" + (change if "keys" in name else ""))
        monkeypatch.setattr(same_software, "__file__", str(folder / "pipeline/cluster/same_software.py"))
        copies.append(software()["refcache"])
    assert copies[0] != copies[1]
