"""What befalls a run of the door: killed at any place, a full disk, another run, a model that is compressed."""

import errno
import itertools
import os
import threading

import new_process
import pytest
from datasets import Dataset
from door_runs import SENTENCES, STACK, TAGGED, run, save_tagger, weights
from tiny_classifiers import save_classifier

from hf_moebert.checkpoints.loading import load_model
from hf_moebert.checkpoints.locks import lock_folder
from hf_moebert.compress import door, running


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = sys.argv[3:]
import torch
torch.set_num_threads(1)
from hf_moebert.compress import door, running
from door_runs import STACK, StopAt, run

PLACES = [  # in the order in which a run comes by
    (running, "apply", 1), (running, "write_manifest", 1), (running.os, "replace", 1),  # the first stage
    (running, "save_json", 2), (running, "write_manifest", 1),  # the second one
    (StopAt, "on_step_begin", 3), (running, "write_manifest", 1),  # training, which goes on at its checkpoint
    (door, "measure", 1), (door, "write_lock", 1), (door, "save_json", 1),
]

def kill_at(owner, name, time):
    function, calls = getattr(owner, name), []
    def counted(*args, **kwargs):
        calls.append(name)
        if len(calls) == time:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    setattr(owner, name, counted)

given, output = map(Path, sys.argv[1:3])
for owner, name, time in PLACES:
    child = os.fork()
    if child == 0:
        kill_at(owner, name, time)
        run(given, output, STACK, resume=True, callbacks=[StopAt(-1)])
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, name
    assert not (output / "report.json").exists()
"""


@pytest.mark.process
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bytes(finished, given, tmp_path):
    output = tmp_path / "run"
    folders = [os.path.dirname(__file__), os.path.dirname(new_process.__file__)]
    new_process.run(KILLED, given, output, *folders)
    lines = []
    result = run(given, output, STACK, resume=True, tell=lines.append)
    assert lines[:3] == [f"{name}: found finished" for name in ("1-prune", "2-experts", "3-distil")]
    assert weights(result.model_folder) == weights(finished.model_folder)
    assert names(output) == names(finished.folder)


def names(folder):
    return {path.relative_to(folder) for path in folder.rglob("*")}


def fills_the_disk(function, time):
    """Return a function that finds no space when it is called for this time."""
    calls = itertools.count(1)

    def counted(*args, **kwargs):
        if next(calls) == time:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return function(*args, **kwargs)

    return counted


WRITTEN = [(running, "write_manifest", 1), (running, "save_json", 2), (running, "write_manifest", 1)]
WRITTEN += [(door, name, 1) for name in ("write_golden", "write_card", "write_compression_report")]


def test_a_full_disk_loses_nothing(finished, given, tmp_path, monkeypatch):
    for owner, name, time in WRITTEN:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fills_the_disk(getattr(owner, name), time))
            with pytest.raises(OSError, match="No space left on device"):
                run(given, tmp_path / "run", STACK, resume=True)
        for stage in (tmp_path / "run/stages").glob("*-????????????"):
            load_model(stage)  # the earlier stages can be used
    result = run(given, tmp_path / "run", STACK, resume=True)
    assert weights(result.model_folder) == weights(finished.model_folder)
    assert names(tmp_path / "run") == names(finished.folder)


def test_two_runs_do_not_share_a_folder(given, tmp_path):
    held, free = threading.Event(), threading.Event()

    def hold():
        with lock_folder(tmp_path / "run"):
            held.set()
            free.wait(60)

    other = threading.Thread(target=hold)
    other.start()
    held.wait(60)
    try:
        with pytest.raises(ValueError, match="another run writes to .* now"):
            run(given, tmp_path / "run", STACK)
    finally:
        free.set()
        other.join()


STRANGE = {
    "tagger": (Dataset.from_list([row | {"tags": ["B-place"] * len(row["tokens"])} for row in TAGGED]), "B-place"),
    "several": (Dataset.from_list([{"text": text, "label": ["spam"]} for text in SENTENCES]), "spam"),
    "classes": (Dataset.from_list([{"text": text, "label": "spam"} for text in SENTENCES]), "spam"),
    "score": (Dataset.from_list([{"text": text, "label": "good"} for text in SENTENCES]), "good"),
}


@pytest.mark.parametrize("kind", STRANGE)
def test_labels_of_another_task_are_refused_before_any_stage(given, tmp_path, kind):
    data, label = STRANGE[kind]
    several = {"labels": ("a", "b", "c"), "problem_type": "multi_label_classification"}
    options = {"several": several, "score": {"labels": ("score",)}}.get(kind, {})
    save_classifier(tmp_path / "given", **options)
    if kind == "tagger":
        save_tagger(tmp_path / "given", given)
    with pytest.raises(ValueError, match=label):
        run(tmp_path / "given", tmp_path / "run", STACK[:1], data)
    assert not (tmp_path / "run/stages").exists()


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (STACK, "dense"),  # units are pruned before experts are made
        ([STACK[1]], "dense"),
        ([STACK[2], "pack"], None),
        ([STACK[3]], None),
    ],
)
def test_a_model_that_is_compressed_already_goes_on_or_is_refused(finished, tmp_path, stages, message):
    if message is None:
        assert run(finished.model_folder, tmp_path / "run", stages).load().config.num_experts == 2
        return
    with pytest.raises(ValueError, match=message):
        run(finished.model_folder, tmp_path / "run", stages)
    assert not list((tmp_path / "run/stages").glob("*"))  # nothing half-done


def test_a_training_run_that_is_refused_leaves_no_folder(given, tmp_path):
    masks = [{"prune": {"method": "masks", "keep_ratio": 0.5, "multiple_of": 5}}, STACK[2]]
    with pytest.raises(ValueError, match="group_size"):
        run(given, tmp_path / "run", masks)
    assert not list((tmp_path / "run/stages").glob("*.training"))
