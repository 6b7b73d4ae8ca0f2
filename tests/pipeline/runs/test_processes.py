"""How many ranks are started, where, and on which devices; wrong wishes are refused before anything starts."""

import base64
import json

import pytest

from pipeline.errors import RequestError
from pipeline.runs.processes import hostfile, rank_command
from pipeline.runs.worker import _heart_beats


def devices(command):
    [world] = [word.removeprefix("--world_info=") for word in command if word.startswith("--world_info=")]
    return json.loads(base64.urlsafe_b64decode(world))["localhost"]


def test_one_rank_needs_no_launcher(tmp_path):
    assert "deepspeed" not in " ".join(rank_command(tmp_path / "job.json", 1, None))


def test_ranks_take_the_devices_that_the_environment_leaves_them(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert devices(rank_command(tmp_path / "job.json", 2, None)) == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,7")
    assert devices(rank_command(tmp_path / "job.json", 2, None)) == ["4", "6"]
    with pytest.raises(RequestError, match=r"ranks is 4 .* CUDA_VISIBLE_DEVICES=4,6,7 has 3 devices"):
        rank_command(tmp_path / "job.json", 4, None)


class TestHostfile:
    def test_its_slots_are_the_ranks(self, tmp_path, monkeypatch):
        (tmp_path / "hosts").write_text("# ours\nnode1 slots=8\nnode2   slots=8  # the new one\n\n#node3 slots=8\n")
        monkeypatch.setenv("REFCACHE_HOSTFILE", str(tmp_path / "hosts"))
        assert hostfile(16) == tmp_path / "hosts"
        with pytest.raises(RequestError, match="has 16 slots on 2 hosts, but ranks is 8"):
            hostfile(8)
        assert hostfile(1) is None  # one rank runs here

    def test_none_is_named_or_it_is_absent(self, tmp_path, monkeypatch):
        monkeypatch.delenv("REFCACHE_HOSTFILE", raising=False)
        assert hostfile(8) is None
        monkeypatch.setenv("REFCACHE_HOSTFILE", str(tmp_path / "absent"))
        with pytest.raises(RequestError, match="does not exist"):
            hostfile(8)

    def test_options_for_deepspeeds_runner_come_after_ours(self, tmp_path, monkeypatch):
        monkeypatch.setenv("REFCACHE_LAUNCHER_OPTIONS", "--launcher openmpi --master_port 1234")
        words = rank_command(tmp_path / "job.json", 16, tmp_path / "hosts")
        assert words[words.index("--hostfile") + 1] == str(tmp_path / "hosts")
        assert words[-6:-1] == ["openmpi", "--master_port", "1234", "--module", "pipeline.runs.worker"]


def test_a_stage_on_another_host_counts_as_gone_once_its_heartbeat_stands_still(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("pipeline.runs.worker.time.monotonic", lambda: now[0])
    beats = _heart_beats(tmp_path / "heartbeat")
    for beat in range(3):
        (tmp_path / "heartbeat").write_text(str(beat))
        now[0] += 59
        assert beats()
    now[0] += 59
    assert beats()
    now[0] += 2
    assert not beats()
