"""A checkpoint counts when its marker is there and every file is as the marker says."""

import pytest

from pipeline.training.checkpoints import complete_checkpoints, drop_unsound, fault_of, place, prune, seal


def write(folder, *steps, sealed=True):
    for step in steps:
        root = place(folder, step)
        (root / "deep").mkdir(parents=True)
        (root / "weights.pt").write_bytes(bytes(range(200)) * step)
        (root / "deep/history.tsv").write_text(f"step\n{step}\n")
        if sealed:
            seal(folder, step)


def truncate(root):
    (root / "weights.pt").write_bytes((root / "weights.pt").read_bytes()[:-1])


def lose(root):
    (root / "deep/history.tsv").unlink()


def flip(root):
    content = bytearray((root / "weights.pt").read_bytes())
    content[77] ^= 4
    (root / "weights.pt").write_bytes(content)


def forget(root):
    root.with_suffix(".complete").write_text("")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (truncate, "weights.pt has 599 bytes, its marker says 600"),
        (lose, "history.tsv is missing"),
        (flip, "content of weights.pt"),
        (forget, "lists no files"),
    ],
)
def test_a_damaged_checkpoint_is_dropped_for_the_one_before_and_said_so(tmp_path, damage, said):
    write(tmp_path, 1, 2, 3)
    damage(place(tmp_path, 3))
    [message] = drop_unsound(tmp_path)
    assert "step 3" in message and said in message
    assert complete_checkpoints(tmp_path) == [1, 2]
    assert sorted(entry.name for entry in tmp_path.iterdir() if entry.is_dir()) == ["step-00000001", "step-00000002"]


def test_sound_checkpoints_stay(tmp_path):
    write(tmp_path, 1, 2)
    assert drop_unsound(tmp_path) == []
    assert complete_checkpoints(tmp_path) == [1, 2] and fault_of(tmp_path, 1) is None


def test_what_was_being_written_goes_without_a_word(tmp_path):
    write(tmp_path, 1)
    write(tmp_path, 2, sealed=False)
    assert drop_unsound(tmp_path) == []
    assert complete_checkpoints(tmp_path) == [1] and not place(tmp_path, 2).exists()


def test_all_damaged_leaves_none(tmp_path):
    write(tmp_path, 1, 2)
    truncate(place(tmp_path, 1))
    flip(place(tmp_path, 2))
    assert len(drop_unsound(tmp_path)) == 2
    assert complete_checkpoints(tmp_path) == []


def test_pruning_keeps_the_newest(tmp_path):
    write(tmp_path, 3, 6, 9, 12)
    prune(tmp_path, 2)
    assert complete_checkpoints(tmp_path) == [9, 12]
    assert not place(tmp_path, 3).exists()
