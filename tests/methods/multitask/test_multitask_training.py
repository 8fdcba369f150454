"""Cached states of a trunk, and the sweep that trains branches for single tasks."""

import copy
import json
import os
import platform
import resource
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    HfArgumentParser,
    TrainingArguments,
    set_seed,
)

from hf_moebert.methods.distillation.functional import soft_cross_entropy
from hf_moebert.methods.multitask.modeling_splitting import join, take_branch, take_trunk
from hf_moebert.methods.multitask.recipe import MultiTaskSweepConfig
from hf_moebert.methods.multitask.training import MultiTaskSweep, MultiTaskSweepTask, Run, new_student
from hf_moebert.methods.multitask.training_states import CachedStates, cache_states, fingerprint_data, pad_examples


VOCAB, LENGTHS = 40, (3, 9, 4, 7, 5, 8, 6, 2)
DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def bert(cls=BertForSequenceClassification, layers=3, labels=2, seed=0, **config):
    """Return a model; those of one seed share their encoder."""
    set_seed(seed)
    sizes = {"vocab_size": VOCAB, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16}
    sizes |= {"num_hidden_layers": layers, "max_position_embeddings": 16, "initializer_range": 0.3}
    encoder = BertModel(BertConfig(**sizes)).state_dict()
    model = cls(BertConfig(**sizes, num_labels=labels, **config))
    model.base_model.load_state_dict(encoder, strict=False)  # not all have a pooler
    return model


def rows(kind="class", count=16, seed=0):
    """Return examples whose label follows from the first token."""
    random, columns = np.random.default_rng(seed), {"input_ids": [], "attention_mask": [], "labels": []}
    for i in range(count):
        ids = random.integers(5, VOCAB, LENGTHS[i % len(LENGTHS)]).tolist()
        columns["input_ids"].append(ids)
        columns["attention_mask"].append([1] * len(ids))
        tags = [-100] + [token % 3 for token in ids[1:]]
        columns["labels"].append({"class": ids[0] % 2, "score": ids[0] / VOCAB, "tokens": tags}[kind])
    return Dataset.from_dict(columns)


def arguments(folder, **options):
    defaults = {"output_dir": str(folder), "report_to": "none", "use_cpu": True, "disable_tqdm": True, "max_steps": 3}
    defaults |= {"save_strategy": "no", "per_device_train_batch_size": 8, "learning_rate": 1e-2, "seed": 1}
    return TrainingArguments(**(defaults | options))


def accuracy(predictions):
    return float(np.mean(predictions.predictions.argmax(-1) == predictions.label_ids))


def tag_accuracy(predictions):
    words = predictions.label_ids != -100
    return float(np.mean(predictions.predictions.argmax(-1)[words] == predictions.label_ids[words]))


def closeness(predictions):
    return 1 - float(np.mean(np.abs(predictions.predictions[:, 0] - predictions.label_ids)))


def sweep(folder, config=None, names=("qq", "qqp", "ner"), **options):
    kinds = {"qq": ("class", BertForSequenceClassification, 2, accuracy)}
    kinds["qqp"] = ("score", BertForSequenceClassification, 1, closeness)
    kinds["ner"] = ("tokens", BertForTokenClassification, 3, tag_accuracy)
    tasks = {}
    for name in names:
        kind, cls, labels, score = kinds[name]
        tasks[name] = MultiTaskSweepTask(
            new_model=lambda cls=cls, labels=labels: bert(cls, labels=labels),
            train_dataset=rows(kind),
            dev_dataset=rows(kind, 8, seed=1),
            score=score,
            metric=score.__name__,
        )
    recipe = MultiTaskSweepConfig(teacher_layers=[1, 2], student_layers=[1, 2]) if config is None else config
    return MultiTaskSweep(tasks, arguments(folder, **options), recipe)


def gradients(loss, model):
    model.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


# Identity


@pytest.mark.parametrize("frozen", [0, 1, 2])
@pytest.mark.parametrize(
    ("cls", "kind", "labels"),
    [
        (BertForSequenceClassification, "class", 2),
        (BertForSequenceClassification, "score", 1),
        (BertForTokenClassification, "tokens", 3),
    ],
)
def test_cached_states_give_loss_and_gradients_of_the_whole_model(tmp_path, frozen, cls, kind, labels):
    whole, data = bert(cls, labels=labels, **DROPOUT), rows(kind)
    states = cache_states(take_trunk(whole, frozen), data, tmp_path, depths=[frozen], batch_size=3)[frozen]
    branch = take_branch(whole, frozen).train()
    for part in (whole.bert.embeddings, *whole.bert.encoder.layer[:frozen]):
        part.requires_grad_(False)
    order = [3, 11, 0, 7, 8]  # other neighbours than while caching
    expected = whole.train()(**pad_examples([data[i] for i in order])).loss
    loss = branch(**pad_examples([states[i] for i in order])).loss
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    theirs, ours = gradients(expected, whole), gradients(loss, branch)
    joined = join(take_trunk(whole, frozen), branch)
    assert not [name for name in joined.state_dict() if name not in whole.state_dict()]
    for name, gradient in ours.items():
        start = "bert.encoder.layer."
        if name.startswith(start):
            index, _, rest = name.removeprefix(start).partition(".")
            name = f"{start}{int(index) + frozen}.{rest}"
        torch.testing.assert_close(gradient, theirs[name], atol=1e-6, rtol=1e-4)
    left = [name for name, gradient in theirs.items() if gradient is None]
    assert all(".embeddings." in name or int(name.split(".")[3]) < frozen for name in left)
    assert len(left) == len(theirs) - len(ours)


def test_questions_padded_to_one_length_are_exact_too(tmp_path):
    whole, data = bert(BertForQuestionAnswering, **DROPOUT), rows().remove_columns("labels")
    padded = {"input_ids": [], "attention_mask": []}
    for ids in data["input_ids"]:
        padded["input_ids"].append(ids + [0] * (9 - len(ids)))
        padded["attention_mask"].append([1] * len(ids) + [0] * (9 - len(ids)))
    data = Dataset.from_dict({**padded, "start_positions": [0] * 16, "end_positions": [1] * 16})
    states = cache_states(take_trunk(whole, 2), data, tmp_path, depths=[2])[2]
    branch = take_branch(whole, 2).train()
    expected = whole.train()(**pad_examples([data[i] for i in range(4)])).loss
    torch.testing.assert_close(branch(**pad_examples([states[i] for i in range(4)])).loss, expected)


@pytest.mark.parametrize("cls", [BertForSequenceClassification, BertForTokenClassification, BertForQuestionAnswering])
def test_a_student_as_deep_as_its_teacher_starts_as_its_teacher(cls):
    teacher = bert(cls).eval()
    teacher.config.frozen_layers = 1
    student = new_student(teacher, 2)
    ids = torch.arange(5, 35).view(2, 15)
    (states,) = take_trunk(teacher, 1)(ids, depths=[1]).values()
    theirs, ours = teacher(ids).to_tuple(), student(inputs_embeds=states).to_tuple()
    assert [torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)] == [True] * len(theirs)


def test_where_a_student_starts():
    teacher, encoder = bert(seed=1), bert()
    teacher.config.frozen_layers = 1
    weight = "bert.encoder.layer.0.output.dense.weight"
    starts = {}
    for init in ("teacher", "next", "random"):
        set_seed(3)
        student = new_student(teacher, 1, init=init, encoder=encoder)
        assert torch.equal(student.classifier.weight, teacher.classifier.weight)
        assert torch.equal(student.bert.pooler.dense.weight, teacher.bert.pooler.dense.weight)
        starts[init] = student.get_parameter(weight)
    assert torch.equal(starts["teacher"], teacher.bert.encoder.layer[1].output.dense.weight)
    assert torch.equal(starts["next"], encoder.bert.encoder.layer[1].output.dense.weight)
    others = [model.bert.encoder.layer[i].output.dense.weight for model in (teacher, encoder) for i in range(3)]
    assert not any(torch.equal(starts["random"], other) for other in others)
    assert starts["random"].std().item() == pytest.approx(0.3, rel=0.3)


# Cached states


def test_files_hold_the_states_of_every_depth_and_are_not_computed_twice(tmp_path):
    model, data = bert(), rows()
    trunk = take_trunk(model, 2)
    found = cache_states(trunk, data, tmp_path, depths=[0, 2], batch_size=5)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["states-0.safetensors", "states-2.safetensors"]
    for depth, states in found.items():
        content = load_file(tmp_path / f"states-{depth}.safetensors")
        assert content["states"].shape == (sum(LENGTHS) * 2, 8)
        assert content["offsets"].tolist()[:3] == [0, 3, 12]
        for i in (0, 5, 15):
            (alone,) = trunk(torch.tensor([data[i]["input_ids"]]), depths=[depth]).values()
            torch.testing.assert_close(states[i]["inputs_embeds"], alone[0])
            assert states[i]["labels"] == data[i]["labels"]
            assert states[i].keys() == {"inputs_embeds", "attention_mask", "labels"}
    bare = data.select_columns("input_ids")  # nothing but what the trunk reads
    alone = cache_states(trunk, bare, tmp_path / "bare", depths=[2])[2]
    assert torch.equal(alone[5]["inputs_embeds"], found[2][5]["inputs_embeds"])
    assert len(alone) == len(found[2])
    before = {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    trunk.forward = None  # whoever runs it now fails
    cache_states(trunk, data.remove_columns("labels"), tmp_path, depths=[0, 2])
    assert {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()} == before


@pytest.mark.process
def test_states_are_read_by_other_processes(tmp_path):
    states = cache_states(take_trunk(bert(), 1), rows(), tmp_path, depths=[1])[1]
    here = states[4]["inputs_embeds"]
    moved = copy.copy(states)  # as a new process gets it: without the open file
    assert moved._states is None
    assert torch.equal(moved[4]["inputs_embeds"], here)
    options = {"num_workers": 1, "multiprocessing_context": "fork", "collate_fn": pad_examples, "batch_size": 8}
    (batch, _) = torch.utils.data.DataLoader(states, **options)
    assert torch.equal(batch["inputs_embeds"][4, : len(here)], here)
    assert not batch["inputs_embeds"][4, len(here) :].any()
    assert batch["attention_mask"].sum(1).tolist() == list(LENGTHS)


def test_an_interrupted_computation_leaves_no_states(tmp_path):
    trunk, calls = take_trunk(bert(), 1), []
    run = trunk.forward

    def fail_later(**inputs):
        calls.append(inputs)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return run(**inputs)

    trunk.forward = fail_later
    with pytest.raises(KeyboardInterrupt):
        cache_states(trunk, rows(), tmp_path, depths=[1], batch_size=4)
    assert not list(tmp_path.glob("*.safetensors"))
    trunk.forward = run
    for process in (os.getpid(), 999_999_999):  # who was killed leaves what it began
        (tmp_path / f".states-1.safetensors.{platform.node()}-{process}.draft").write_bytes(b"half")
    assert len(cache_states(trunk, rows(), tmp_path, depths=[1])[1]) == 16
    assert [file.name for file in tmp_path.iterdir()] == ["states-1.safetensors"]


def test_states_of_another_trunk_or_other_texts_are_refused(tmp_path):
    trunk, data = take_trunk(bert(), 2), rows()
    states = cache_states(trunk, data, tmp_path, depths=[1])[1]
    for other, examples in ((take_trunk(bert(seed=1), 2), data), (trunk, rows(seed=5)), (trunk, rows(count=15))):
        with pytest.raises(ValueError, match="states-1.safetensors must hold the states of this data set and trunk"):
            cache_states(other, examples, tmp_path, depths=[1])
    with torch.no_grad():
        trunk.layer[1].output.dense.weight.add_(1)  # after the depth that is asked for
    cache_states(trunk, data, tmp_path, depths=[1])
    with pytest.raises(ValueError, match="`examples` must be the 16 that .* was written for, got 15"):
        CachedStates(states.file, rows(count=15))
    with pytest.raises(ValueError, match="`dataset` must hold encoded examples with 'input_ids', got 16"):
        cache_states(trunk, data.remove_columns("input_ids"), tmp_path / "other", depths=[1])
    content = states.file.read_bytes()
    states.file.write_bytes(content[:-5])
    with pytest.raises(ValueError, match="states-1.safetensors must hold states, but it is damaged.*Delete it"):
        cache_states(trunk, data, tmp_path, depths=[1])


# The recipe


def test_the_command_line_sets_every_knob():
    parser = HfArgumentParser(MultiTaskSweepConfig)
    (config,) = parser.parse_args_into_dataclasses([])
    assert config == MultiTaskSweepConfig([4, 5, 6, 7, 8, 9, 10], [1, 2, 3], "teacher", 2.0, 1.0)
    values = ["--teacher_layers", "2", "3", "--student_layers", "1", "--student_init", "next", "--temperature", "4"]
    (config,) = parser.parse_args_into_dataclasses([*values, "--min_gain", "2"])
    assert config == MultiTaskSweepConfig([2, 3], [1], "next", 4.0, 2.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"teacher_layers": []}, r"`teacher_layers` must list different numbers of layers from 1 up, got \[\]"),
        ({"teacher_layers": [2, 2]}, r"got \[2, 2\]"),
        ({"student_layers": [0]}, r"`student_layers` must list different numbers of layers from 1 up, got \[0\]"),
        ({"student_layers": "12"}, "got '12'"),
        ({"student_layers": [11]}, r"must not go beyond the largest of `teacher_layers`, 10, got \[11\]"),
        ({"student_init": "last"}, "`student_init` must be one of teacher, next, random, got 'last'"),
        ({"temperature": 0.0}, "`temperature` must be a finite number above 0, got 0.0"),
        ({"min_gain": -1}, "`min_gain` must be a finite number of at least 0, got -1"),
    ],
)
def test_bad_recipes_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        MultiTaskSweepConfig(**values)


def test_recipes_and_names_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`teacher_layers` must be in \[1, 3\] for an encoder of 3 layers, got \[4"):
        sweep(tmp_path, MultiTaskSweepConfig())
    with pytest.raises(ValueError, match="A task's name must be .*got '../qq'"):
        MultiTaskSweep({"../qq": None}, arguments(tmp_path))
    with pytest.raises(ValueError, match="not a method of torch's `ModuleDict` .*got 'keys'"):
        MultiTaskSweep({"keys": None}, arguments(tmp_path))
    with pytest.raises(ValueError, match="`tasks` must hold at least one task"):
        MultiTaskSweep({}, arguments(tmp_path))
    tasks = {
        f"task-{seed}": MultiTaskSweepTask(lambda seed=seed: bert(seed=seed), rows(), rows(), accuracy, "hits")
        for seed in (0, 1)
    }
    with pytest.raises(ValueError, match="`tasks` must share one encoder, got another for 'task-1' than for 'task-0'"):
        MultiTaskSweep(tasks, arguments(tmp_path), MultiTaskSweepConfig([1], [1]))


# The sweep


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A sweep over three tasks: classes, numbers and tags."""
    folder = tmp_path_factory.mktemp("sweep")
    whole = sweep(folder)
    whole.run()
    return whole


def test_frozen_layers_stay_the_encoders_bit_for_bit(finished):
    encoder = bert()
    for task in ("qq", "qqp", "ner"):
        for run in (Run("teacher", 1), Run("teacher", 2), finished.branch(task)(1)):
            model = finished.load(task, run)
            frozen = model.config.frozen_layers
            assert (frozen + run.layers == 3) == (run.kind == "teacher")
            ours, theirs = take_trunk(model, frozen).state_dict(), take_trunk(encoder, frozen).state_dict()
            assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
            trained = model.bert.encoder.layer[frozen].output.dense.weight
            assert not torch.equal(trained, encoder.bert.encoder.layer[frozen].output.dense.weight)
    whole = finished.load("qq", Run("whole", 3))
    assert not torch.equal(
        whole.bert.embeddings.word_embeddings.weight, encoder.bert.embeddings.word_embeddings.weight
    )


def test_the_score_is_that_of_the_saved_model(finished):
    for run in (Run("whole", 3), Run("teacher", 2)):
        model, dev = finished.load("ner", run).eval(), rows("tokens", 8, seed=1)
        hits = []
        for row in dev:
            predicted = model(torch.tensor([row["input_ids"]])).logits[0].argmax(-1)
            hits += [int(p) == t for p, t in zip(predicted, row["labels"], strict=True) if t != -100]
        assert finished.make("ner", run) == pytest.approx(np.mean(hits))


def test_a_finished_sweep_is_not_repeated_and_unfinished_runs_are(finished, tmp_path, monkeypatch):
    folder = shutil.copytree(finished.output, tmp_path / "copy")
    again = sweep(folder)
    task, run = next((task, run) for task, run in again.runs() if run.kind == "student")
    cut_short = again.folder(task, run)
    first = {name: value.clone() for name, value in load_file(cut_short / "model.safetensors").items()}
    (cut_short / "result.json").unlink()
    (cut_short / "model.safetensors").write_bytes(b"half")
    made, train = [], MultiTaskSweep._train
    monkeypatch.setattr(MultiTaskSweep, "_train", lambda self, *names: made.append(names) or train(self, *names))
    again.run()
    assert made == [(task, run)]
    second = load_file(cut_short / "model.safetensors")
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def test_runs_of_other_settings_are_refused(finished):
    changed = {"learning_rate": 1e-3, "max_steps": 4, "seed": 2, "optim": "sgd", "label_smoothing_factor": 0.1}
    for name, value in {**changed, "adam_beta1": 0.8}.items():
        message = f"whole must hold a run of these settings.* {name}: {value} here, .*Choose another `output_dir`"
        with pytest.raises(ValueError, match=message):
            sweep(finished.output, names=["qq"], **{name: value}).run()
    task = finished.tasks["qq"].task
    others = {
        "metric": replace(task, metric="f1"),
        "model": replace(task, new_model=lambda: bert(BertForTokenClassification)),
        "config": replace(task, new_model=lambda: bert(hidden_dropout_prob=0.9)),
    }
    for name, other in others.items():
        with pytest.raises(ValueError, match=f"must hold a run of these settings.*{name}: "):
            MultiTaskSweep({"qq": other}, finished.args, finished.config).run()
    irrelevant = {"logging_steps": 3, "run_name": "x", "dataloader_num_workers": 1, "per_device_eval_batch_size": 2}
    assert sweep(finished.output, **irrelevant).make("qq", Run("teacher", 1)) >= 0
    task = next(task for task, run in finished.runs() if run.kind == "student")
    hotter = MultiTaskSweepConfig(teacher_layers=[1, 2], student_layers=[1], temperature=3.0)
    with pytest.raises(ValueError, match="student-1 must hold a run of these settings"):
        sweep(finished.output, hotter, names=[task]).run()
    fewer = {"qq": MultiTaskSweepTask(bert, rows(count=8), rows(count=8, seed=1), accuracy, "accuracy")}
    with pytest.raises(ValueError, match="must hold a run of these settings"):
        MultiTaskSweep(fewer, finished.args, finished.config).run()


def test_runs_of_other_settings_are_taken_if_that_is_allowed(finished, caplog):
    args = arguments(finished.output, learning_rate=1e-3)
    again = MultiTaskSweep({"qq": finished.tasks["qq"].task}, args, finished.config, allow_changes=True)
    again.run()
    assert again.make("qq", Run("teacher", 1)) == finished.make("qq", Run("teacher", 1))
    assert "other settings, and is taken as it is: learning_rate: 0.001 here, 0.01 there" in caplog.text


@pytest.mark.parametrize("text", ["", "[]", "{", '{"score": 1.0}', '{"score": 1.0, "settings": 3}', "half"])
def test_a_damaged_result_is_named(finished, tmp_path, text):
    folder = shutil.copytree(finished.output / "qq", tmp_path / "qq") / "teacher-1"
    whole = (folder / "result.json").read_text()
    (folder / "result.json").write_text(whole.replace('"score": 0', '"score": 1') if text == "half" else text)
    with pytest.raises(ValueError, match=r"qq/teacher-1/result.json' must .* Delete it, and the run is made again"):
        sweep(tmp_path, names=["qq"]).make("qq", Run("teacher", 1))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_flipped_byte_in_the_model_of_a_finished_run_is_found(finished, tmp_path, name):
    folder = shutil.copytree(finished.output / "qq", tmp_path / "qq") / "teacher-2"
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    copied = sweep(tmp_path, names=["qq"])
    with pytest.raises(ValueError, match=rf"qq/teacher-2' must hold the model of its result.json, but {name} has"):
        copied.load("qq", Run("teacher", 2))
    (folder / "result.json").unlink()
    copied.make("qq", Run("teacher", 2))
    copied.load("qq", Run("teacher", 2))


def test_a_flipped_byte_in_stored_states_is_found(tmp_path):
    trunk, data = take_trunk(bert(), 1), rows()
    file = cache_states(trunk, data, tmp_path, depths=[1])[1].file
    content = bytearray(file.read_bytes())
    content[-7] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"states-1.safetensors' must be as it was written.*Delete it, and it is"):
        cache_states(trunk, data, tmp_path, depths=[1])


def test_a_run_that_cannot_be_saved_is_named(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise SafetensorError("I/O error: No space left on device")

    small = sweep(tmp_path, MultiTaskSweepConfig([1], [1]), names=["qq"])
    monkeypatch.setattr(BertForSequenceClassification, "save_pretrained", fail)
    with pytest.raises(OSError, match=r"qq/teacher-1' cannot be written: .*No space left.* Free some space"):
        small.make("qq", Run("teacher", 1))
    assert not (tmp_path / "qq/teacher-1/result.json").exists()


def test_states_that_do_not_fit_on_the_disk_leave_nothing(tmp_path):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        with pytest.raises(OSError, match=r"states-1.safetensors' cannot be written.*Free some space"):
            cache_states(take_trunk(bert(), 1), rows(), tmp_path, depths=[0, 1])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert list(tmp_path.iterdir()) == []


def test_the_best_teacher_and_the_depths_are_read_off_the_dev_scores(finished, monkeypatch):
    scores = {("teacher", 1): 0.7, ("teacher", 2): 0.8, ("teacher", 3): 0.8, ("student", 1): 0.75}
    monkeypatch.setattr(MultiTaskSweep, "make", lambda self, task, run: scores[run.kind, run.layers])
    sweeping = sweep(
        finished.output, MultiTaskSweepConfig(teacher_layers=[3, 1, 2], student_layers=[1, 2, 3]), names=["qq"]
    )
    assert sweeping.choose_teacher("qq") == 2  # ties to fewer layers
    assert sweeping.student_scores("qq") == {1: 0.75, 2: 0.8}  # as deep as the teacher is the teacher
    assert sweeping.choose_depths() == {"qq": 2}
    assert sweeping.choose_depths(min_gain=6) == {"qq": 1}
    assert sweeping.choose_depths(min_gain=6, uniform=True) == {"qq": 1}
    assert sweeping.choose_depths(uniform=True) == {"qq": 2}  # three layers are the teacher's two, and gain nothing
    assert [run.name for _, run in sweeping.runs()] == ["whole", "teacher-1", "teacher-2", "teacher-3", "student-1"]


def test_students_learn_by_the_loss_of_the_paper(tmp_path):
    recipe = MultiTaskSweepConfig(teacher_layers=[2], student_layers=[1], temperature=2.0)
    dropless = MultiTaskSweepTask(lambda: bert(**DROPOUT), rows(count=8), rows(count=8, seed=1), accuracy, "hits")
    sweeping = MultiTaskSweep({"qq": dropless}, arguments(tmp_path, max_steps=1, logging_steps=1), recipe)
    trainer = sweeping._train("qq", Run("student", 1))
    teacher = sweeping.load("qq", Run("teacher", 2)).eval()
    batch = pad_examples(list(rows(count=8)))
    (states,) = take_trunk(teacher, 1)(batch["input_ids"], batch["attention_mask"], depths=[1]).values()
    found = new_student(teacher, 1)(
        inputs_embeds=states, attention_mask=batch["attention_mask"], labels=batch["labels"]
    )
    labels = {name: value for name, value in batch.items() if name != "labels"}
    expected = found.loss + soft_cross_entropy(found.logits, teacher(**labels).logits, 2.0).mean()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert not trainer.teacher.training


def test_the_merged_model_answers_as_the_models_of_the_runs(finished):
    depths = finished.choose_depths(min_gain=0)
    merged = finished.merge(depths).eval()
    ids = torch.arange(5, 35).view(2, 15)
    answers = merged(input_ids=ids)
    assert sorted(answers) == ["ner", "qq", "qqp"]
    for task, layers in depths.items():
        alone = finished.load(task, finished.branch(task)(layers)).eval()
        assert torch.equal(answers[task].logits, alone(ids).logits)


def test_results_say_how_they_were_made(finished):
    for task, run in finished.runs():
        result = json.loads((finished.folder(task, run) / "result.json").read_text())
        assert 0 <= result["score"] <= 1
        assert result["settings"]["seed"] == 1
        assert result["settings"]["layers"] == run.layers
        assert result["command"]


@pytest.mark.parametrize("run", [Run("whole", 3), Run("teacher", 1)])
def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path, run):
    data = Dataset.from_dict({"input_ids": [[5 + i, 9, 11] for i in range(16)], "labels": [i % 2 for i in range(16)]})
    task = MultiTaskSweepTask(lambda: bert(**DROPOUT), data, data, accuracy, "accuracy")
    options = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 1, "max_grad_norm": 0}
    found = []
    for steps in (1, 4):
        sizes = {"per_device_train_batch_size": 16 // steps, "gradient_accumulation_steps": steps}
        args = arguments(tmp_path / str(steps), **options, **sizes)
        found.append(
            MultiTaskSweep({"qq": task}, args, MultiTaskSweepConfig([1], [1]))._train("qq", run).model.state_dict()
        )
    for name, weight in found[0].items():
        torch.testing.assert_close(found[1][name], weight, msg=name)


def test_scores_that_are_no_numbers_are_refused(tmp_path):
    task = MultiTaskSweepTask(bert, rows(), rows(), lambda predictions: float("nan"), "nothing")
    sweeping = MultiTaskSweep({"qq": task}, arguments(tmp_path, max_steps=1), MultiTaskSweepConfig([1], [1]))
    with pytest.raises(ValueError, match="The score of 'qq', teacher-1, must be finite, got nan"):
        sweeping.choose_teacher("qq")
    assert not (tmp_path / "qq/teacher-1/result.json").exists()


def test_merging_makes_the_runs_that_are_missing(tmp_path):
    sweeping = sweep(tmp_path, MultiTaskSweepConfig([1], [1]), names=["qq"], max_steps=1)
    assert sweeping.merge({"qq": 1}).tasks == ["qq"]
    assert (tmp_path / "qq/teacher-1/result.json").exists()
    assert not (tmp_path / "qq/whole").exists()


def test_students_start_somewhere_known():
    teacher = bert()
    teacher.config.frozen_layers = 1
    with pytest.raises(ValueError, match="`init` must be one of teacher, next, random, got 'last'"):
        new_student(teacher, 1, init="last")
    with pytest.raises(ValueError, match="`encoder` must be given"):
        new_student(teacher, 1, init="next")


def test_examples_may_come_as_tensors(tmp_path):
    data, trunk = rows(), take_trunk(bert(), 1)
    assert fingerprint_data(data.with_format("torch")) == fingerprint_data(data)
    plain, tensors = (cache_states(trunk, x, tmp_path, depths=[1])[1] for x in (data, data.with_format("torch")))
    for name, value in pad_examples([plain[i] for i in (3, 0)]).items():
        assert torch.equal(pad_examples([tensors[i] for i in (3, 0)])[name], value)
