"""What the example keeps of its runs, and what its report may do."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from test_multitask_training import arguments, rows, sweep

from hf_moebert.methods.multitask.training import MultiTaskSweep, Run


class Learned:
    """Stands for `LearnedTask`: predicts at once, and counts how often."""

    def __init__(self, task, validation):
        self.task, self.validation, self.calls = task, validation, 0

    def for_sweep(self):
        return self.task

    def predict(self, model, args):
        self.calls += 1
        return {"predictions": [1], "truths": [1]}


@pytest.fixture
def make_study(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples")
    from multitask_bert import ExampleArguments, MultiTaskStudy

    whole = sweep(tmp_path, names=["qq"])

    def make(validation, **changes):
        task = replace(whole.tasks["qq"].task, **changes)
        args = arguments(tmp_path, max_steps=1)
        return MultiTaskStudy({"qq": Learned(task, validation)}, args, whole.config, ExampleArguments())

    return make


def test_predictions_are_kept_for_the_examples_and_the_run_they_were_made_of(make_study):
    run = Run("teacher", 1)
    study = make_study(rows(count=4, seed=2))
    study.sweep(0).make("qq", run)
    assert [study.predictions(0, "qq", run)["predictions"] for _ in range(2)] == [[1], [1]]
    assert study.tasks["qq"].calls == 1
    again, other = make_study(rows(count=4, seed=2)), make_study(rows(count=4, seed=3))
    for renewed, calls in ((again, 0), (other, 1)):
        renewed.predictions(0, "qq", run)
        assert renewed.tasks["qq"].calls == calls


def test_a_report_trains_nothing(make_study, monkeypatch):
    study = make_study(rows(count=4))
    monkeypatch.setattr(MultiTaskSweep, "_train", None)  # whoever calls it now fails
    with pytest.raises(SystemExit, match="Seed 0: qq, whole is missing: run `--stage train` first"):
        study.refuse_missing()
    folder = study.sweep(0).folder("qq", Run("whole", 3))
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps({"score": 1.0, "settings": {}}))
    with pytest.raises(SystemExit, match="Seed 0: qq, teacher-1 is missing"):
        study.refuse_missing()
