"""The multi-task study keeps predictions of its runs, and its report trains nothing."""

import json

import pytest
from multitask_bert import MultiTaskOptions, MultiTaskStudy
from multitask_tasks import LearnedTask, read_tasks
from smoke import make_smoke_tasks
from transformers import TrainingArguments

from hf_moebert.methods.multitask.recipe import MultiTaskSweepConfig
from hf_moebert.methods.multitask.training import MultiTaskSweep, Run


pytestmark = pytest.mark.process


@pytest.fixture
def make_study(tmp_path):
    """Return a function that reads one task, validates on some of its rows, and plans its runs."""
    encoder, tasks = make_smoke_tasks(tmp_path / "inputs")
    args = TrainingArguments(tmp_path, max_steps=1, save_strategy="no", use_cpu=True, disable_tqdm=True)
    config = MultiTaskSweepConfig(teacher_layers=[1, 2], student_layers=[1])

    def make(validation_rows):
        entry = read_tasks(tasks)["mood"]
        task = LearnedTask(entry, encoder, max_length=16, dev_share=0.1, max_dev_examples=9, seed=0)
        task.validation = task.validation.select(validation_rows)
        return MultiTaskStudy({"mood": task}, args, config, MultiTaskOptions())

    return make


def test_predictions_are_kept_for_the_examples_and_the_run_they_were_made_of(make_study, monkeypatch):
    run, study = Run("teacher", 1), make_study([0, 1, 2])
    study.sweep(0).make("mood", run)
    made = study.predictions(0, "mood", run)
    assert [len(made[name]) for name in ("predictions", "truths")] == [3, 3]

    asked = []
    predict = type(study.tasks["mood"]).predict
    monkeypatch.setattr(type(study.tasks["mood"]), "predict", lambda *args: asked.append(args) or predict(*args))
    again, other = make_study([0, 1, 2]), make_study([0, 1, 4])
    assert study.predictions(0, "mood", run) == again.predictions(0, "mood", run) == made
    assert asked == []
    assert other.predictions(0, "mood", run)["source"] != made["source"]
    assert len(asked) == 1


def test_a_report_trains_nothing(make_study, monkeypatch):
    study = make_study([0, 1])
    monkeypatch.setattr(MultiTaskSweep, "_train", None)  # whoever calls it now fails
    with pytest.raises(SystemExit, match="Seed 0: mood, whole is missing: run `--stage train` first"):
        study.refuse_missing()
    folder = study.sweep(0).folder("mood", Run("whole", 2))
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps({"score": 1.0, "settings": {}}))
    with pytest.raises(SystemExit, match="Seed 0: mood, teacher-1 is missing"):
        study.refuse_missing()
