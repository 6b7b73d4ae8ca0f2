"""The progress line of a training where there is no terminal."""

from pipeline.runs import progress_line as module
from pipeline.runs.progress_line import training_progress
from pipeline.training.record import History

ROW = {"loss": 0.51239, "rewards/margins": 1.5, "rewards/accuracies": 0.75, "dcr": 0.25, "tokens_per_second": 812.4}


def test_the_closing_line_has_step_loss_margin_accuracy_dcr_and_speed(tmp_path, capsys):
    history = History(tmp_path / "history.tsv", keep_steps=0)
    with training_progress("dpo-0", 9, history.path):
        history.append({"step": 1} | ROW)
        history.append({"step": 2} | ROW)
    said = capsys.readouterr().err
    assert said == "dpo-0: step 2 of 9  loss 0.5124  margin 1.5  acc 0.75  dcr 0.25  tok/s 812.4\n"


def test_now_and_then_a_line_says_how_much_time_is_left_counted_from_where_this_run_began(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    lines = module._Lines("dpo-0", 100)
    for step in range(60, 71):  # resumed at 60: ten steps in 40 seconds
        lines.row({"step": step} | ROW)
        now[0] += 4
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("dpo-0: step 68 of 100  loss")
    assert said[0].endswith("about 2 min 8 s left")


def test_a_run_that_ends_before_its_first_step_says_so(tmp_path, capsys):
    with training_progress("sft", 5, tmp_path / "absent.tsv"):
        pass
    assert capsys.readouterr().err.startswith("sft: step 0 of 5")
