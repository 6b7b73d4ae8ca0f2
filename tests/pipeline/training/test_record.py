"""history.tsv survives kills: cut back to the resumed step, a torn last line dropped."""

from pipeline.training.record import History, last_row


def write(path, steps, keep=0):
    history = History(path, keep_steps=keep)
    for step in steps:
        history.append({"step": step, "loss": step / 7})


def test_resuming_cuts_later_rows_and_appends(tmp_path):
    whole, resumed = tmp_path / "whole.tsv", tmp_path / "resumed.tsv"
    write(whole, range(1, 9))
    write(resumed, range(1, 7))
    with resumed.open("a") as file:
        file.write("7\t0.9")  # torn by a kill
    write(resumed, range(5, 9), keep=4)
    assert resumed.read_text() == whole.read_text()


def test_a_fresh_start_drops_the_old_history(tmp_path):
    write(tmp_path / "h.tsv", range(1, 5))
    write(tmp_path / "h.tsv", [1])
    assert last_row(tmp_path / "h.tsv")["step"] == 1


def test_last_row_ignores_a_line_still_being_written(tmp_path):
    assert last_row(tmp_path / "none.tsv") == {}
    write(tmp_path / "h.tsv", [1, 2])
    with (tmp_path / "h.tsv").open("a") as file:
        file.write("3\t0.")
    assert last_row(tmp_path / "h.tsv")["step"] == 2
