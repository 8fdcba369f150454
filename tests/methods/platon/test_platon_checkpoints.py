"""Resuming, bit for bit, and checkpoints that are missing, broken, foreign or half written."""

import json
import os
import pickle
import random
import resource
import shutil
from dataclasses import replace
from pathlib import Path

import platon_runs
import pytest
import torch
from platon_runs import SaveAt, StopAt, assert_same_weights, callback_of, count_all_zeros, gather_state, pruner_of
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from hf_moebert import DistillationTrainer, PlatonConfig, last_complete_checkpoint
from hf_moebert.checkpoints import tensor_files
from hf_moebert.checkpoints.locks import LOCK_FILE
from hf_moebert.checkpoints.manifests import MANIFEST_FILE
from hf_moebert.methods.platon.training_pruner import Pruner
from hf_moebert.methods.platon.training_state import STATE_FILE, write_state


NUMBERS = ("clock", "ratio", "threshold", "revived", "dropped")


def saving(**arguments):
    return {"save_strategy": "steps", "save_steps": 1} | arguments


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The Trainer of an uninterrupted run, with a checkpoint of every step."""
    trainer = platon_runs.make_trainer(tmp_path_factory.mktemp("whole"), platon_runs.make_bert(), **saving())
    trainer.train()
    return trainer


@pytest.fixture
def copy_checkpoints(whole, folder):
    """A function that copies checkpoints of the uninterrupted run, and returns the last."""

    def copy(*steps):
        for step in steps:
            name = f"checkpoint-{step}"
            copied = shutil.copytree(Path(whole.args.output_dir) / name, folder / name)
        return copied

    return copy


def logs_of(trainer):
    clocks = ("runtime", "per_second", "train_loss", "total_flos")
    return [
        {key: value for key, value in entry.items() if not key.endswith(clocks)} for entry in trainer.state.log_history
    ]


# A resumed run is the uninterrupted one. Pruning begins after step 2, masks are made at 3, 6, ..., 14 is the last step
# before the final phase, and an epoch has 8 steps.

RECIPES = {
    "platon, while the ratio falls": ({}, (2, 4, 6)),
    "platon, in the last phase": ({}, (14, 15, 19)),
    "post_step": ({"sensitivity_at": "post_step", "include_bias": True}, (4, 16)),
    "movement": ({"criterion": "movement"}, (1, 6, 16)),
    "magnitude": ({"criterion": "magnitude"}, (6, 16)),
    "structured": ({"granularity": "structured", "keep_ratio": 0.5, "min_keep": 0.2}, (6, 16)),
    "importance": ({"criterion": "importance"}, (6,)),
    "2:4": ({"granularity": "2:4", "keep_ratio": 0.5}, (4, 16)),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_resumed_run_is_the_uninterrupted_one(tiny_bert, make_trainer, folder, name):
    recipe, steps = RECIPES[name]
    arguments = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    whole = make_trainer(tiny_bert(hidden_dropout_prob=0.1), recipe, callbacks=[SaveAt(steps)], **arguments)
    whole.train()
    for step in steps:
        resumed = make_trainer(tiny_bert(hidden_dropout_prob=0.1), recipe, **arguments)
        with torch.no_grad():
            resumed.model.classifier.weight.zero_()  # all comes from the checkpoint
        resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
        assert_same_weights(resumed.model, whole.model)
        ours, theirs = gather_state(resumed), gather_state(whole)
        assert [key for key in theirs if not torch.equal(ours[key], theirs[key])] == []
        for number in NUMBERS:
            assert getattr(pruner_of(resumed), number) == getattr(pruner_of(whole), number)
        assert logs_of(resumed) == logs_of(whole)


def test_a_resumed_run_is_not_a_new_one(tiny_bert, make_trainer, whole, copy_checkpoints):
    """The test above would not notice: without the state, the end is another."""
    resumed = make_trainer(tiny_bert())
    callback = callback_of(resumed)
    on_train_begin = callback.on_train_begin

    def forget(args, state, control, **kwargs):
        on_train_begin(args, replace(state, global_step=0), control, **kwargs)

    callback.on_train_begin = forget
    resumed.train(resume_from_checkpoint=str(copy_checkpoints(8)))
    with pytest.raises(AssertionError):
        assert_same_weights(resumed.model, whole.model)


@pytest.mark.parametrize("changes", [{}, {"moved": True}])
def test_resume_from_a_moved_checkpoint(tiny_bert, make_trainer, whole, copy_checkpoints, tmp_path, changes):
    moved = copy_checkpoints(7).rename(tmp_path / "elsewhere é")
    resumed = make_trainer(tiny_bert(), output_dir=str(tmp_path / "another run"))
    if not changes:
        with pytest.raises(ValueError, match=r"checkpoint-7.* does not exist: .*`resume_from`"):
            resumed.train(resume_from_checkpoint=str(moved))
        return
    callback_of(resumed).resume_from = moved
    resumed.train(resume_from_checkpoint=str(moved))
    assert_same_weights(resumed.model, whole.model)


def test_states_of_0_1_0_are_read(tiny_bert, make_trainer, whole, interrupted):
    """They call `keep_ratio` `final_ratio`."""
    with safe_open(interrupted / STATE_FILE, framework="pt") as opened:
        config = json.loads(opened.metadata()["platon"])["config"]
    config["final_ratio"] = config.pop("keep_ratio")
    rewrite(interrupted / STATE_FILE, config=config)
    (interrupted / MANIFEST_FILE).unlink()
    resumed = make_trainer(tiny_bert())
    resumed.train(resume_from_checkpoint=str(interrupted))
    assert_same_weights(resumed.model, whole.model)


# What cannot be resumed


@pytest.fixture
def interrupted(copy_checkpoints):
    """The checkpoint of step 10, which a test may damage."""
    return copy_checkpoints(10)


def truncate(file):
    file.write_bytes(file.read_bytes()[:-1])


def cut_header(file):
    file.write_bytes(file.read_bytes()[:20])


def garble(file):
    file.write_bytes(random.Random(0).randbytes(4096))


def put_pickle(file):
    class Canary:
        def __reduce__(self):
            return os.mkdir, (str(file.parent / "canary"),)

    file.write_bytes(pickle.dumps(Canary()))


def put_weights(file):
    shutil.copy(file.parent / "model.safetensors", file)


def rewrite(file, metadata=None, **state):
    with safe_open(file, framework="pt") as opened:
        known = json.loads(opened.metadata()["platon"])
    save_file(load_file(file), file, metadata=metadata or {"platon": json.dumps(known | state)})


BROKEN = {
    "missing": (Path.unlink, "does not exist: its saving was interrupted"),
    "empty": (lambda file: file.write_bytes(b""), "must be a complete safetensors"),
    "truncated": (truncate, "must be a complete safetensors"),
    "header": (cut_header, "must be a complete safetensors"),
    "garbage": (garble, "must be a complete safetensors"),
    "pickle": (put_pickle, "must be a complete safetensors"),
    "foreign": (put_weights, "must hold the state of a pruning run"),
    "no json": (lambda file: rewrite(file, {"platon": "{"}), "must hold the state of a pruning run"),
    "a list": (lambda file: rewrite(file, {"platon": "[]"}), "must hold the state of a pruning run"),
    "no config": (lambda file: rewrite(file, {"platon": "{}"}), "must hold the state of a pruning run"),
    "no numbers": (lambda file: rewrite(file, numbers={}), "must hold the state of a pruning run"),
    "odd numbers": (
        lambda file: rewrite(file, numbers={"mask": 1, "clock": 10}),
        "must hold the state of a pruning run",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_state_is_refused(tiny_bert, make_trainer, interrupted, kind):
    damage, message = BROKEN[kind]
    damage(interrupted / STATE_FILE)
    with pytest.raises(ValueError, match=rf"must be as it was saved .*{STATE_FILE} .*`last_complete_checkpoint`"):
        make_trainer(tiny_bert()).train(resume_from_checkpoint=str(interrupted))
    (interrupted / MANIFEST_FILE).unlink()
    with pytest.raises(ValueError, match=message) as refusal:
        make_trainer(tiny_bert()).train(resume_from_checkpoint=str(interrupted))
    assert str(interrupted / STATE_FILE) in str(refusal.value)
    assert not (interrupted / "canary").exists()
    pruner = Pruner(tiny_bert(), PlatonConfig(keep_ratio=0.3, initial_warmup=2, final_warmup=6, window=3), 20)
    with pytest.raises(ValueError, match=message):
        pruner.load(interrupted, 10)
    assert pruner.clock == 0  # nothing was half loaded
    assert all(keep.all() for keep in pruner.keep.values())
    assert not any(t.any() for named in pruner.statistics.tensors.values() for t in named.values())


def test_a_checkpoint_of_a_run_without_pruning_is_refused(tiny_bert, make_trainer, folder):
    make_trainer(tiny_bert(), False, **saving(max_steps=2)).train()
    with pytest.raises(ValueError, match=r"platon_state.safetensors, but .* or nothing was pruned in that run"):
        make_trainer(tiny_bert()).train(resume_from_checkpoint=str(folder / "checkpoint-2"))


CHANGES = [
    ({"keep_ratio": 0.4}, {}, "keep_ratio: 0.3 -> 0.4"),
    ({"beta1": 0.5, "window": 4}, {}, "window: 3 -> 4; beta1: 0.85 -> 0.5"),
    ({"modules": ["bert.encoder"]}, {}, r"modules: None -> \['bert.encoder'\]"),
    ({}, {"max_steps": 25}, "total steps: 20 -> 25"),
]


@pytest.mark.parametrize(("recipe", "arguments", "message"), CHANGES)
def test_a_changed_recipe_is_refused_unless_allowed(tiny_bert, make_trainer, interrupted, recipe, arguments, message):
    trainer = make_trainer(tiny_bert(), recipe, **arguments)
    with pytest.raises(ValueError, match=f"must have the recipe it began with, but {message}. Undo the change, or"):
        trainer.train(resume_from_checkpoint=str(interrupted))
    callback_of(trainer).allow_changes = True
    trainer.train(resume_from_checkpoint=str(interrupted))
    assert pruner_of(trainer).clock == trainer.args.max_steps
    zeros, numel = count_all_zeros(trainer.model)
    assert zeros == round((1 - callback_of(trainer).config.keep_ratio) * numel)


def test_a_run_that_is_cut_short_on_purpose_ends_as_sparse_as_asked_for(tiny_bert, make_trainer, interrupted):
    """Resumed in the middle of a window of what has become the final phase, and over before the next window begins."""
    trainer = make_trainer(tiny_bert(), {"final_warmup": 3}, max_steps=11)
    callback_of(trainer).allow_changes = True
    trainer.train(resume_from_checkpoint=str(interrupted))
    zeros, numel = count_all_zeros(trainer.model)
    assert zeros == round(0.7 * numel)


@pytest.mark.parametrize(
    ("sizes", "recipe"),
    [
        ({"intermediate_size": 48}, {}),
        ({"num_hidden_layers": 3}, {}),
        ({}, {"criterion": "movement"}),
        ({}, {"include_bias": True}),
    ],
)
def test_the_state_of_another_model_is_refused(tiny_bert, interrupted, sizes, recipe):
    recipe = {"keep_ratio": 0.3, "initial_warmup": 2, "final_warmup": 6, "window": 3} | recipe
    pruner = Pruner(tiny_bert(**sizes), PlatonConfig(**recipe), 20)
    with pytest.raises(ValueError, match=r"must hold the statistics of this model and criterion, but .*layer"):
        pruner.load(interrupted, 10, allow_changes=True)
    assert pruner.clock == 0
    assert all(keep.all() for keep in pruner.keep.values())


def test_the_state_of_another_step_is_refused(tiny_bert, make_trainer, copy_checkpoints):
    trainer = make_trainer(tiny_bert())
    callback_of(trainer).resume_from = copy_checkpoints(15)
    with pytest.raises(ValueError, match=r"must be of the step the Trainer resumes from, 5, but it is of step 15"):
        trainer.train(resume_from_checkpoint=str(copy_checkpoints(5)))


def test_the_state_of_another_run_is_refused(tiny_bert, make_trainer, copy_checkpoints, tmp_path):
    """Its step is right, its weights are not: an `output_dir` that was used before."""
    other = {"output_dir": str(tmp_path / "other")}
    make_trainer(tiny_bert(), callbacks=[StopAt(5)], learning_rate=1e-3, **other, **saving(save_steps=5)).train()
    trainer = make_trainer(tiny_bert(), **other)
    with pytest.raises(ValueError, match=r"but it was saved beside other weights. Pass the folder of that checkpoint"):
        trainer.train(resume_from_checkpoint=str(copy_checkpoints(5)))


# What is on disk


def test_models_alone_have_no_state(tiny_bert, make_trainer, folder):
    make_trainer(tiny_bert(), callbacks=[StopAt(2)], **saving(save_steps=2, save_only_model=True)).train()
    assert (folder / "checkpoint-2" / "model.safetensors").exists()
    assert not (folder / "checkpoint-2" / STATE_FILE).exists()


def test_every_checkpoint_of_the_final_phase_is_exactly_sparse(whole):
    names, folder = pruner_of(whole).parameters, Path(whole.args.output_dir)
    for step in range(1, 21):
        weights = load_file(folder / f"checkpoint-{step}" / "model.safetensors")
        zeros = sum(int((weights[name] == 0).sum()) for name in names)
        state = load_file(folder / f"checkpoint-{step}" / STATE_FILE)
        if step >= 15:
            assert zeros == round(0.7 * pruner_of(whole).numel)
            assert all(torch.equal(state[f"keep.{name}"], weights[name].flatten() != 0) for name in names)
        assert sorted(file.name for file in (folder / f"checkpoint-{step}").glob(".*")) == []
    assert zeros > 0


def test_old_checkpoints_still_go(tiny_bert, make_trainer, folder):
    make_trainer(tiny_bert(), **saving(save_steps=5, save_total_limit=2)).train()
    assert sorted(path.name for path in folder.iterdir()) == [LOCK_FILE, "checkpoint-15", "checkpoint-20"]
    assert all((path / STATE_FILE).is_file() for path in folder.glob("checkpoint-*"))


def test_a_folder_that_is_elsewhere_is_warned_of(tiny_bert, make_trainer, tmp_path, caplog_of_transformers):
    """A hyper-parameter search saves in `run-<id>/checkpoint-<step>`."""
    trainer = make_trainer(tiny_bert(), **saving(save_steps=10))
    trainer._get_output_dir = lambda trial: str(tmp_path / "run" / "run-0")
    trainer.train()
    assert (
        f"{tmp_path / 'run' / 'checkpoint-10'} does not exist, so that nothing was saved"
        in caplog_of_transformers.text
    )
    assert list(tmp_path.rglob(STATE_FILE)) == []


# A disk that does not want to


@pytest.mark.parametrize("error", [OSError("No space left on device"), SafetensorError("I/O error: File too large")])
@pytest.mark.parametrize("part", [b"", b"half of it"])
def test_a_full_disk_leaves_the_old_file(tiny_bert, make_trainer, interrupted, monkeypatch, error, part):
    def fail(tensors, file, metadata):
        Path(file).write_bytes(part)
        raise error

    before = (interrupted / STATE_FILE).read_bytes()
    monkeypatch.setattr(tensor_files, "save_file", fail)
    with pytest.raises(OSError, match=r"checkpoint-10/platon_state.safetensors' cannot be written: .*Free some space"):
        make_trainer(tiny_bert(), **saving(save_steps=10)).train()
    assert (interrupted / STATE_FILE).read_bytes() == before
    assert list(interrupted.glob(".*")) == []


@pytest.mark.process
def test_a_real_limit_of_the_file_system(whole, tmp_path):
    """In a process of its own, since the limit holds for all files from then on."""
    pruner = pruner_of(whole)
    write_state(tmp_path, *pruner.collect(5))
    before = (tmp_path / STATE_FILE).read_bytes()
    process = os.fork()
    if not process:
        code = 1
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, len(before) // 2))
            write_state(tmp_path, *pruner.collect(5))
        except OSError as error:
            code = 0 if "cannot be written" in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    assert (tmp_path / STATE_FILE).read_bytes() == before
    assert list(tmp_path.glob(".*")) == []


# The last complete checkpoint


@pytest.mark.parametrize("damage", ["missing", "truncated", "header", "garbage", "pickle", "empty"])
def test_a_checkpoint_without_its_state_is_skipped(
    tiny_bert, make_trainer, whole, copy_checkpoints, folder, caplog_of_transformers, damage
):
    copy_checkpoints(10, 15, 20)
    BROKEN[damage][0](folder / "checkpoint-20" / STATE_FILE)
    BROKEN[damage][0](folder / "checkpoint-15" / STATE_FILE)
    found = last_complete_checkpoint(str(folder))
    assert found == str(folder / "checkpoint-10")
    for step in (15, 20):
        assert f"checkpoint-{step} is not whole and is skipped: {STATE_FILE} " in caplog_of_transformers.text
    resumed = make_trainer(tiny_bert())
    resumed.train(resume_from_checkpoint=found)
    assert_same_weights(resumed.model, whole.model)


def test_no_complete_checkpoint_is_refused(copy_checkpoints, folder, tmp_path):
    copy_checkpoints(10, 20)
    for step in (10, 20):
        (folder / f"checkpoint-{step}" / STATE_FILE).unlink()
    for where in (folder, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match="must find a complete checkpoint in"):
            last_complete_checkpoint(str(where))


def test_a_student_resumes_from_the_last_complete_checkpoint(tiny_bert, make_trainer, folder):
    def make(**arguments):
        torch.manual_seed(0)
        return make_trainer(
            tiny_bert(), trainer_class=DistillationTrainer, extra={"teacher": tiny_bert().eval()}, **arguments
        )

    whole = make(**saving(save_steps=5))
    whole.train()
    (folder / "checkpoint-20" / STATE_FILE).unlink()
    truncate(folder / "checkpoint-15" / STATE_FILE)
    resumed = make()
    begun = []
    begin = callback_of(resumed).on_train_begin
    callback_of(resumed).on_train_begin = lambda args, state, control, **kwargs: (
        begun.append(state.global_step),
        begin(args, state, control, **kwargs),
    )[1]
    resumed.train(resume_from_checkpoint=True)
    assert begun == [10]
    assert_same_weights(resumed.model, whole.model)
