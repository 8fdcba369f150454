"""What every callback does for its run: lock the folder, write manifests last, refuse what has changed."""

import json
import os
import shutil
import time
from pathlib import Path

import faults_runs
import pytest
import torch
from faults_runs import KINDS, make_bert, make_sweep, make_trainer
from transformers import Trainer, TrainerCallback

from hf_moebert import CheckpointManifestCallback, PlatonPruningCallback, last_complete_checkpoint
from hf_moebert.checkpoints.locks import LOCK_FILE, lock_folder
from hf_moebert.checkpoints.manifests import MANIFEST_FILE, find_fault, write_manifest


RESUMABLE = {"trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "config.json"}
FOUR = {"max_steps": 4, "save_steps": 2}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Folders of finished runs of four steps with two checkpoints, by kind, made when a test asks for them."""
    folders = {}

    def finish(kind):
        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp(kind.replace(" ", "-"))
            make_trainer(kind, folders[kind], **FOUR).train()
        return folders[kind]

    return finish


@pytest.fixture
def begun(finished, tmp_path):
    """A function that returns a copy of a finished run's folder."""
    return lambda kind: shutil.copytree(finished(kind), tmp_path / "begun")


def resume(kind, folder, checkpoint=None, **options):
    checkpoint = checkpoint or folder / "checkpoint-2"
    model = None
    if kind == "squeezing":
        model = faults_runs.AutoModelForSequenceClassification.from_pretrained(checkpoint)
    trainer = make_trainer(kind, folder, model=model, **FOUR | options)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    return trainer


# Manifests


@pytest.mark.parametrize("kind", KINDS)
def test_a_manifest_lists_all_files_of_a_checkpoint(finished, kind):
    for step in (2, 4):
        folder = finished(kind) / f"checkpoint-{step}"
        listed = json.loads((folder / MANIFEST_FILE).read_text())["files"]
        assert listed.keys() | {MANIFEST_FILE} == {path.name for path in folder.iterdir()}
        assert RESUMABLE | {"model.safetensors"} <= listed.keys()
        assert find_fault(folder) is None
    assert last_complete_checkpoint(finished(kind)) == str(finished(kind) / "checkpoint-4")


@pytest.mark.parametrize("order", [1, -1])
def test_the_last_of_several_callbacks_writes_the_manifest_after_the_files_of_all(tmp_path, monkeypatch, order):
    written = []
    monkeypatch.setattr("hf_moebert.checkpoints.callbacks.write_manifest", lambda folder: written.append(folder))
    recipe = faults_runs.CALLBACKS["pruning"][1]
    trainer = make_trainer("manifest", tmp_path, max_steps=8, save_steps=8)
    trainer.pop_callback(CheckpointManifestCallback)
    for callback in [CheckpointManifestCallback(), PlatonPruningCallback(recipe)][::order]:
        trainer.add_callback(callback)
    trainer.train()
    assert written == [tmp_path / "checkpoint-8"]
    assert (written[0] / "platon_state.safetensors").exists()


def test_the_manifest_is_written_when_nothing_of_ours_is_left_to_write(tmp_path, monkeypatch):
    """Where a run is killed just before its manifest, all other files are there, and it does not count."""

    def die(folder):
        assert RESUMABLE <= {path.name for path in Path(folder).iterdir()}
        raise KeyboardInterrupt

    make_trainer("pruning", tmp_path, save_steps=4).train()
    monkeypatch.setattr("hf_moebert.checkpoints.callbacks.write_manifest", die)
    with pytest.raises(KeyboardInterrupt):
        make_trainer("pruning", tmp_path, save_steps=8, seed=1).train()
    assert (tmp_path / "checkpoint-8" / MANIFEST_FILE).exists()  # of the first run, and so of other files
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")


def test_models_alone_have_no_manifest(tmp_path):
    make_trainer("manifest", tmp_path, **FOUR, save_only_model=True, save_total_limit=1).train()
    assert not list(tmp_path.rglob(MANIFEST_FILE))
    with pytest.raises(ValueError, match=rf"which has none: .*checkpoint-4: {MANIFEST_FILE} is missing"):
        last_complete_checkpoint(tmp_path)


DAMAGES = {
    "missing": (lambda file: file.unlink(), r"{name} is missing"),
    "longer": (lambda file: file.write_bytes(file.read_bytes() + b"x"), r"{name} has [\d,]+ bytes instead of [\d,]+"),
    "empty": (lambda file: file.write_bytes(b""), r"{name} has 0 bytes instead of [\d,]+"),
    "flipped": (
        lambda file: file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:]),
        r"{name} has the SHA-256 \w+ instead of \w+",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", sorted(RESUMABLE | {"model.safetensors", "platon_state.safetensors"}))
def test_a_checkpoint_with_a_damaged_file_is_skipped_and_the_file_is_named(begun, name, damage, caplog):
    folder, (change, message) = begun("pruning"), DAMAGES[damage]
    change(folder / "checkpoint-4" / name)
    assert last_complete_checkpoint(folder) == str(folder / "checkpoint-2")
    assert caplog.records[-1].message.startswith(f"{folder}/checkpoint-4 is not whole and is skipped: {name} ")
    (folder / "checkpoint-2" / MANIFEST_FILE).unlink()
    with pytest.raises(ValueError, match=rf"has none: .*checkpoint-4: {message.format(name=name)}; .*checkpoint-2: "):
        last_complete_checkpoint(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must hold a JSON object, but it does not"),
        ("[1]", "must hold a JSON object, but it does not"),
        ("{}", "has format version None, and this release reads '1'"),
        ('{"format_version": "2", "files": {}}', "has format version '2', and this release reads '1'"),
        ('{"format_version": "1", "files": {}, "sha256": "0"}', "must be as it was written"),
        ('{"format_version": "1", "files": {"../../x": {"size": 1, "sha256": "0"}}}', r"../../x is missing"),
        (
            '{"format_version": "1", "files": {"model.safetensors": 3}}',
            "the list of its files must give their sizes and SHA-256",
        ),
        ("[" * 100_000, "must hold a JSON object, but it does not"),
    ],
)
def test_a_damaged_manifest_is_not_believed(tmp_path, text, message):
    (tmp_path / "x").write_bytes(b"1")
    folder = tmp_path / "run/checkpoint-2"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"1")
    (folder / MANIFEST_FILE).write_text(text)
    assert message in find_fault(folder)
    with pytest.raises(ValueError, match="must find a complete checkpoint in"):
        last_complete_checkpoint(tmp_path / "run")


def test_files_in_folders_count_and_hidden_ones_do_not(tmp_path):
    (tmp_path / "global_step3").mkdir()
    (tmp_path / "global_step3" / "states.pt").write_bytes(b"1")
    (tmp_path / ".x.draft").write_bytes(b"1")
    write_manifest(tmp_path)
    (tmp_path / ".x.draft").unlink()
    assert find_fault(tmp_path) is None
    (tmp_path / "global_step3" / "states.pt").write_bytes(b"2")
    assert find_fault(tmp_path).startswith("global_step3/states.pt has the SHA-256")


# Resuming


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_uninterrupted_one(begun, kind):
    folder = begun(kind)
    whole = make_trainer(kind, folder.with_name("whole"), **FOUR)
    whole.train()
    resumed = resume(kind, folder)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_checkpoint_is_refused(begun, kind):
    folder = begun(kind)
    (folder / "checkpoint-2" / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-2' must be as it was saved .* optimizer.pt is missing"):
        resume(kind, folder)
    (folder / "checkpoint-2" / MANIFEST_FILE).unlink()  # whose saving was cut short
    with pytest.raises(ValueError, match=r"but optimizer\* are missing. .*`last_complete_checkpoint` returns, or"):
        resume(kind, folder)
    resume(kind, folder, allow_changes=True)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "manifest"])
def test_a_changed_recipe_is_refused_unless_allowed(begun, kind):
    folder, (_, before, after) = begun(kind), faults_runs.CALLBACKS[kind]
    changed = {name: value for name, value in vars(after).items() if vars(before)[name] != value}
    (name, new), old = *changed.items(), vars(before)[next(iter(changed))]
    with pytest.raises(ValueError, match=rf"{name}\W* (from )?{old}( ->| to) {new}.*allow_changes=True"):
        resume(kind, folder, changed=True)
    resume(kind, folder, changed=True, allow_changes=True)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "manifest"])
def test_another_length_is_refused_unless_allowed(begun, kind):
    folder = begun(kind)
    with pytest.raises(ValueError, match=r"(total.steps|max_steps)\W* (from )?4( ->| to) 6.*allow_changes=True"):
        resume(kind, folder, max_steps=6)
    resume(kind, folder, max_steps=6, allow_changes=True)


def test_a_student_is_told_before_transformers_reads_a_damaged_file(begun):
    folder = begun("distillation")
    (folder / "checkpoint-2" / "optimizer.pt").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"optimizer.pt has 1 bytes .* pass `allow_changes=True` to DistillationTra"):
        resume("distillation", folder)


def test_a_recipe_is_found_wherever_the_checkpoint_lies(begun, tmp_path):
    folder = begun("gradient mask")
    with pytest.raises(ValueError, match=r"keep: 0.5 -> 0.6"):
        resume("gradient mask", tmp_path / "elsewhere", folder / "checkpoint-2", changed=True)


def test_a_checkpoint_may_lie_elsewhere(begun, tmp_path):
    folder = begun("manifest")
    (folder / "checkpoint-2" / "training_args.bin").write_bytes(b"x")
    options = {"checkpoint": folder / "checkpoint-2", "resume_from": folder / "checkpoint-2"}
    with pytest.raises(ValueError, match=r"training_args.bin has 1 bytes instead of"):
        resume("manifest", tmp_path / "elsewhere", **options)


def test_to_keep_one_checkpoint_only_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`save_total_limit` must be at least 2, got 1"):
        make_trainer("manifest", tmp_path, save_total_limit=1).train()
    assert not list(tmp_path.glob("checkpoint-*"))


# Locks


class Watch(TrainerCallback):
    """Try in another process to begin a second run in the folder of the first."""

    def __init__(self, attempt):
        self.attempt, self.code = attempt, None

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.code = in_child(self.attempt)


def in_child(attempt):
    """Return 0 if an attempt in a child is refused because of the lock, 1 if it succeeds, and 2 otherwise."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 2
    try:
        attempt()
        code = 1
    except ValueError as error:
        code = 0 if "but another run writes to" in str(error) else 2
    finally:
        os._exit(code)


@pytest.mark.process
@pytest.mark.parametrize("kind", KINDS)
def test_a_second_run_in_the_folder_of_another_process_is_refused(tmp_path, kind):
    watch = Watch(make_trainer(kind, tmp_path / "run", save_strategy="no", max_steps=2).train)
    trainer = make_trainer(kind, tmp_path / "run", max_steps=4, save_strategy="no")
    trainer.add_callback(watch)
    trainer.train()
    assert watch.code == 0
    assert in_child(lambda: lock_folder(tmp_path / "run")) == 1  # given back at the end


@pytest.mark.process
def test_a_second_sweep_in_the_folder_of_another_process_is_refused(tmp_path, monkeypatch):
    sweep, codes = make_sweep(tmp_path), []
    train = sweep._train

    def watched(task, run):
        codes.append(in_child(make_sweep(tmp_path).run))
        return train(task, run)

    monkeypatch.setattr(sweep, "_train", watched)
    sweep.run()
    assert set(codes) == {0}
    assert in_child(make_sweep(tmp_path).run) == 1  # given back at the end


@pytest.mark.process
@pytest.mark.parametrize("workers", [0, 1])
def test_the_lock_ends_with_its_process(tmp_path, workers):
    """Even if processes that it forked, such as those of a data loader, live on for a while."""
    ready, child = tmp_path / "ready", os.fork()
    if not child:
        held = lock_folder(tmp_path)
        if workers and not os.fork():
            time.sleep(5)
            os._exit(0)
        ready.touch()
        time.sleep(60 if held else 0)
        os._exit(0)
    while not ready.exists():
        time.sleep(0.01)
    with pytest.raises(ValueError, match="must be the folder of one run at a time"):
        lock_folder(tmp_path)
    os.kill(child, 9)
    os.waitpid(child, 0)
    lock_folder(tmp_path).lock.release()


def test_a_run_that_failed_does_not_lock_out_the_next(tmp_path):
    class Fails(Trainer):
        def training_step(self, *args, **kwargs):
            raise RuntimeError("out of memory")

    args = faults_runs.make_arguments(tmp_path, **FOUR)
    failed = Fails(make_bert(), args, train_dataset=faults_runs.make_data(), callbacks=[CheckpointManifestCallback()])
    for _ in range(2):
        with pytest.raises(RuntimeError, match="out of memory"):
            failed.train()
    make_trainer("manifest", tmp_path, **FOUR).train()
    assert (tmp_path / LOCK_FILE).exists()
    assert find_fault(tmp_path / "checkpoint-4") is None


def test_a_folder_that_cannot_be_written_to_is_refused_before_training(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"`output_dir` must be a folder that can be written to, got .*file"):
        lock_folder(tmp_path / "file")


def test_a_recipe_is_stored_as_it_was_begun(finished):
    state = json.loads((finished("distillation") / "checkpoint-4/trainer_state.json").read_text())
    (stored,) = (x for name, x in state["stateful_callbacks"].items() if name.startswith("hf_moebert."))
    assert stored["total_steps"] == 4
