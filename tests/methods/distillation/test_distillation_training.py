"""A student, a teacher and the Trainer; run as a script, one process of a distributed run."""

import copy
import json
import logging
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy, mse_loss
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    BertTokenizer,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.testing_utils import CaptureLogger
from two_processes import leave, read_both, run_in_two, sharding_on_a_cpu

from hf_moebert.checkpoints.manifests import write_manifest
from hf_moebert.methods.distillation import DistillationConfig, DistillationTrainer
from hf_moebert.methods.distillation.functional import (
    classification_loss,
    hidden_state_loss,
    soft_cross_entropy,
    symmetric_kl,
)
from hf_moebert.training import sharding


VOCAB, LABELS = 40, 3
LENGTHS = (3, 9, 4, 7, 5, 8, 6, 9)


def bert(seed=0, cls=BertForSequenceClassification, dropout=0.0, **config):
    set_seed(seed)
    sizes = {"vocab_size": VOCAB, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 16, "max_position_embeddings": 16, "num_labels": LABELS, "initializer_range": 0.3}
    dropouts = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return cls(BertConfig(**(sizes | dropouts | config)))


def rows(label="class", count=8):
    generator = torch.Generator().manual_seed(7)
    data = []
    for i in range(count):
        length = LENGTHS[i % len(LENGTHS)]
        ids = torch.randint(5, VOCAB, (length,), generator=generator)
        row = {"input_ids": ids, "token_type_ids": torch.arange(length) // 2 % 2}
        if label == "class":
            row["labels"] = torch.tensor(i % LABELS)
        elif label == "score":
            row["labels"] = torch.tensor(i / 4)
        elif label == "several":
            row["labels"] = torch.tensor([i % 2, 1, i // 2 % 2]).float()
        elif label == "tokens":  # two labelled tokens per row: the stock head's mean over tokens is one over rows
            row["labels"] = torch.cat([torch.tensor([1, i % LABELS]), torch.full((length - 2,), -100)])
        elif label == "span":
            row |= {"start_positions": torch.tensor(1), "end_positions": torch.tensor(length - 1)}
        data.append(row)
    return data


def collate(batch):
    longest = max(len(row["input_ids"]) for row in batch)
    if "end_positions" in batch[0]:
        longest = max(LENGTHS)  # the stock head's own softmax runs over the padding, so it must be the same everywhere

    def pad(value, filler):
        return torch.cat([value, torch.full((longest - len(value),), filler)])

    columns = {"attention_mask": torch.stack([pad(torch.ones_like(row["input_ids"]), 0) for row in batch])}
    for name in batch[0]:
        values = [row[name] for row in batch]
        if name in ("input_ids", "token_type_ids"):
            values = [pad(value, 0) for value in values]
        elif name == "labels" and any(len(v) != len(values[0]) for v in values if v.dim()):
            values = [pad(value, -100) for value in values]
        columns[name] = torch.stack(values)
    return columns


def arguments(folder, **options):
    defaults = {"output_dir": str(folder), "report_to": "none", "use_cpu": True, "disable_tqdm": True, "max_steps": 1}
    defaults |= {"save_strategy": "no", "logging_steps": 1, "per_device_train_batch_size": 8, "seed": 1}
    defaults |= {"lr_scheduler_type": "constant", "learning_rate": 1e-2}
    return TrainingArguments(**(defaults | options))


def distil(folder, student, teacher, recipe=None, data=None, **options):
    to_trainer = {name: options.pop(name) for name in list(options) if name in ("compute_loss_func", "eval_dataset")}
    return DistillationTrainer(
        model=student,
        teacher=teacher,
        distillation=recipe,
        args=arguments(folder, **options),
        data_collator=collate,
        train_dataset=rows() if data is None else data,
        **to_trainer,
    )


PLAIN_SGD = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, "weight_decay": 0.0}


def gradients(trainer):
    """One step of plain gradient descent with rate 1 moves each weight by its gradient."""
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    after = {name: p.detach() for name, p in trainer.model.named_parameters()}
    return {name: before[name] - (p.full_tensor() if isinstance(p, DTensor) else p) for name, p in after.items()}


def assert_equal_states(one, other):
    one, other = one.state_dict(), other.state_dict()
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def training_logs(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


# Identity


@pytest.mark.parametrize("accumulation", [1, 2])
def test_without_weight_it_is_the_stock_trainer_bit_for_bit(tmp_path, accumulation):
    options = {"max_steps": 3, "per_device_train_batch_size": 4, "gradient_accumulation_steps": accumulation}
    students = [bert(dropout=0.2), bert(dropout=0.2)]
    for student in students:
        student.accepts_loss_kwargs = False  # or the stock trainer does not divide by the accumulation steps
    distil(tmp_path, students[0], bert(1), DistillationConfig(weight=0.0), **options).train()
    Trainer(students[1], arguments(tmp_path, **options), data_collator=collate, train_dataset=rows()).train()
    assert_equal_states(*students)


@pytest.mark.parametrize("bf16", [False, True])
def test_a_student_equal_to_its_teacher_is_at_distance_zero(tmp_path, bf16):
    trainer = distil(tmp_path, bert(), bert(dropout=0.5), bf16=bf16)
    trainer.train()
    (logs,) = training_logs(trainer)
    terms = {name: value for name, value in logs.items() if name.startswith("loss_") and name != "loss_task"}
    assert terms == dict.fromkeys(["loss_hidden", *[f"loss_hidden_{k}" for k in range(3)], "loss_prediction"], 0.0)
    assert logs["loss"] == pytest.approx(logs["loss_task"], rel=1e-6)


# Oracles


def outputs_of(model, batch):
    inputs = {name: value for name, value in batch.items() if "label" not in name}
    return model.eval()(**inputs, output_hidden_states=True)


def test_the_loss_is_that_of_the_paper_over_real_tokens(tmp_path):
    student, teacher, batch = bert(), bert(1), collate(rows())
    trainer = distil(tmp_path, student, teacher, DistillationConfig(weight=3.0))
    loss = trainer.compute_loss(student.train(), batch)
    ours, theirs = outputs_of(student, batch), outputs_of(teacher, batch)
    expected = cross_entropy(ours.logits, batch["labels"]) + 3 * symmetric_kl(ours.logits, theirs.logits).mean()
    for ours_k, theirs_k in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        for row, length in enumerate(LENGTHS):
            expected = expected + 3 / 8 * mse_loss(ours_k[row, :length], theirs_k[row, :length])
    torch.testing.assert_close(loss, expected)


PREDICTIONS = DistillationConfig(hidden_states=False, temperature=2.0)


def test_predictions_alone_follow_a_teacher_of_any_depth_and_width(tmp_path):
    student, teacher, batch = bert(num_hidden_layers=1), bert(1, num_hidden_layers=3, hidden_size=12), collate(rows())
    trainer = distil(tmp_path, student, teacher, PREDICTIONS, max_steps=2)
    loss = trainer.compute_loss(student.train(), batch)
    ours, theirs = outputs_of(student, batch).logits, outputs_of(teacher, batch).logits
    expected = cross_entropy(ours, batch["labels"]) + soft_cross_entropy(ours, theirs, 2.0).mean()
    torch.testing.assert_close(loss, expected)
    trainer.train()
    (logs, _) = training_logs(trainer)
    assert {name for name in logs if name.startswith("loss_")} == {"loss_task", "loss_prediction"}
    assert logs["loss"] == pytest.approx(logs["loss_task"] + logs["loss_prediction"], rel=1e-6)


@pytest.mark.parametrize(
    ("cls", "label", "config"),
    [
        (BertForSequenceClassification, "score", {"num_labels": 1}),
        (BertForSequenceClassification, "several", {}),
        (BertForTokenClassification, "tokens", {}),
        (BertForQuestionAnswering, "span", {"num_labels": 2}),
    ],
)
def test_predictions_alone_at_the_teacher_bring_the_gradient_of_the_task(tmp_path, cls, label, config):
    found, data = [], rows(label)
    for recipe in (PREDICTIONS, DistillationConfig(weight=0.0)):
        student = bert(cls=cls, **config)
        trainer = distil(tmp_path, student, bert(cls=cls, **config), recipe, data, **PLAIN_SGD)
        found.append(gradients(trainer))
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], atol=1e-6, rtol=1e-4)


def test_the_parity_option_averages_over_padding_too(tmp_path):
    student, teacher, batch = bert(), bert(1), collate(rows())
    trainer = distil(tmp_path, student, teacher, DistillationConfig(mask_padding=False))
    loss = trainer.compute_loss(student.train(), batch)
    ours, theirs = outputs_of(student, batch), outputs_of(teacher, batch)
    expected = cross_entropy(ours.logits, batch["labels"]) + symmetric_kl(ours.logits, theirs.logits).mean()
    expected = expected + sum(map(mse_loss, ours.hidden_states, theirs.hidden_states))
    torch.testing.assert_close(loss, expected)


def test_a_row_does_not_feel_its_neighbours_or_their_padding(tmp_path):
    student, teacher, data = bert(), bert(1), rows()
    trainer = distil(tmp_path, student, teacher)
    student.train()
    alone = [trainer.compute_loss(student, collate([row])) for row in data]
    torch.testing.assert_close(trainer.compute_loss(student, collate(data)), torch.stack(alone).mean())


@pytest.mark.parametrize(
    ("cls", "label", "config"),
    [
        (BertForSequenceClassification, "class", {}),
        (BertForSequenceClassification, "score", {"num_labels": 1}),
        (BertForSequenceClassification, "several", {}),
        (BertForTokenClassification, "tokens", {}),
        (BertForTokenClassification, None, {}),
        (BertForQuestionAnswering, "span", {"num_labels": 2}),
        (BertForQuestionAnswering, None, {"num_labels": 2}),
    ],
)
def test_one_batch_of_eight_gives_the_gradients_of_four_batches_of_two(tmp_path, cls, label, config):
    found = []
    for size, steps in ((8, 1), (2, 4)):
        student, teacher = bert(0, cls, **config), bert(1, cls, **config)
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps} | PLAIN_SGD
        found.append(gradients(distil(tmp_path, student, teacher, data=rows(label), **options)))
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], atol=1e-6, rtol=1e-5)


def mean_over_all_items(outputs, labels, num_items_in_batch):
    return cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


@pytest.mark.parametrize("options", [{"label_smoothing_factor": 0.1}, {"compute_loss_func": mean_over_all_items}])
def test_losses_that_count_their_items_accumulate_too(tmp_path, options):
    found, logged = [], []
    for size, steps in ((8, 1), (2, 4)):
        split = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps} | PLAIN_SGD
        trainer = distil(tmp_path, bert(), bert(1), **split, **options)
        found.append(gradients(trainer))
        logged.append(training_logs(trainer)[0])
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], atol=1e-6, rtol=1e-5)
    for name in ("loss", "loss_task", "loss_hidden", "loss_prediction"):
        assert logged[0][name] == pytest.approx(logged[1][name], rel=1e-5)


def test_token_labels_and_padding_are_left_out(tmp_path):
    student, teacher = bert(0, BertForTokenClassification), bert(1, BertForTokenClassification)
    trainer, batch = distil(tmp_path, student, teacher, data=rows("tokens")), collate(rows("tokens"))
    ours, theirs = outputs_of(student, batch), outputs_of(teacher, batch)
    batch["labels"] = torch.randint(0, LABELS, batch["labels"].shape)  # labels in the padding, too
    batch["labels"][:, 0] = -100
    counted = batch["attention_mask"].bool()
    real = counted.clone()
    counted[:, 0] = False
    expected = classification_loss(ours.logits, theirs.logits, counted)
    expected = expected + sum(
        hidden_state_loss(a, b, real) for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True)
    )
    task = student.train()(**batch).loss
    torch.testing.assert_close(trainer.compute_loss(student, batch) - task, expected)


def test_gradient_checkpointing_changes_nothing(tmp_path):
    plain = gradients(distil(tmp_path, bert(), bert(1), **PLAIN_SGD))
    frugal = gradients(distil(tmp_path, bert(), bert(1), activation_checkpointing=True, **PLAIN_SGD))
    for name in plain:
        torch.testing.assert_close(plain[name], frugal[name], atol=1e-6, rtol=1e-5)


# The teacher


def test_the_teacher_stays_frozen_quiet_and_out_of_the_student(tmp_path):
    student, teacher = bert(dropout=0.1), bert(1, dropout=0.1)
    before = copy.deepcopy(teacher)
    trainer = distil(tmp_path, student, teacher, max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    student.train()
    assert not any(module.training for module in teacher.modules())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert_equal_states(teacher, before)
    optimised = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert optimised == {id(p) for p in student.parameters()}
    saved = tmp_path / "checkpoint-2" / "model.safetensors"
    assert load_file(saved).keys() == student.state_dict().keys()
    student.save_pretrained(tmp_path / "alone")
    assert saved.stat().st_size == (tmp_path / "alone" / "model.safetensors").stat().st_size


def test_reference_dropout_makes_even_the_embedding_targets_noisy(tmp_path):
    recipe = DistillationConfig(reference_teacher_dropout=True)
    trainer = distil(tmp_path, bert(), bert(dropout=0.5), recipe)
    trainer.train()
    assert training_logs(trainer)[0]["loss_hidden_0"] > 0


def test_a_shallow_student_follows_the_mapped_layers(tmp_path):
    student, teacher, batch = bert(num_hidden_layers=1), bert(1, num_hidden_layers=3), collate(rows())
    trainer = distil(tmp_path, student, teacher, DistillationConfig(layer_map=[2]), max_steps=20)
    trainer.train()
    logs = training_logs(trainer)
    assert "loss_hidden_1" in logs[0]
    assert "loss_hidden_2" not in logs[0]
    assert logs[-1]["loss_hidden_1"] < 0.5 * logs[0]["loss_hidden_1"]
    trainer.compute_loss(student.train(), batch)
    ours, theirs = outputs_of(student, batch).hidden_states, outputs_of(teacher, batch).hidden_states
    expected = hidden_state_loss(ours[1], theirs[2], batch["attention_mask"].bool())
    trainer.log(last := {"loss": 0.0})
    assert last["loss_hidden_1"] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # asked for by peft
def test_adapters_on_either_side_see_all_their_inputs(tmp_path):
    from peft import LoraConfig, get_peft_model  # here, for the processes of the last test need not wait for it

    lora = LoraConfig(task_type="SEQ_CLS", target_modules=["query"])
    student, teacher = get_peft_model(bert(), lora), get_peft_model(bert(1), lora)
    trainer, batch = distil(tmp_path, student, teacher, max_steps=2), collate(rows())
    trainer.train()
    expected = hidden_state_loss(
        outputs_of(student, batch).hidden_states[0],
        outputs_of(bert(1), batch).hidden_states[0],
        batch["attention_mask"].bool(),
    )
    assert training_logs(trainer)[-1]["loss_hidden_0"] == pytest.approx(expected.item(), rel=1e-5)


# Evaluation, prediction, logs


def test_evaluation_and_prediction_are_the_stock_ones(tmp_path):
    student = bert()
    trainer = distil(tmp_path, student, bert(1), DistillationConfig(weight=5.0), eval_dataset=rows())
    stock = Trainer(student, arguments(tmp_path), data_collator=collate, eval_dataset=rows())
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == stock.evaluate()["eval_loss"]
    assert not [name for name in metrics if "hidden" in name or "prediction" in name]
    prediction = trainer.predict(rows(label=None))
    assert prediction.predictions.shape == (8, LABELS)
    assert prediction.label_ids is None


def test_batches_without_labels_are_taught_by_the_teacher_alone(tmp_path):
    trainer = distil(tmp_path, bert(), bert(1), data=rows(label=None), max_steps=10)
    logging.Logger.warning_once.cache_clear()  # said once per process, perhaps by a test before this one
    with CaptureLogger(logging.getLogger("hf_moebert.methods.distillation.training")) as captured:
        trainer.train()
    assert captured.out.count("No ['labels'] in the batch: the student learns from the teacher alone.") == 1
    first, *_, last = training_logs(trainer)
    assert first["loss_task"] == 0
    assert first["loss"] == pytest.approx(first["loss_hidden"] + first["loss_prediction"], rel=1e-6)
    assert last["loss"] < first["loss"]


def test_logged_terms_are_means_over_the_micro_batches_and_add_up(tmp_path):
    options = {"max_steps": 4, "logging_steps": 2, "gradient_accumulation_steps": 2, "eval_strategy": "steps"}
    options |= {"per_device_train_batch_size": 2, "eval_steps": 1, "eval_dataset": rows()}
    trainer = distil(tmp_path, bert(), bert(1), DistillationConfig(weight=2.0), **options)
    trainer.train()
    assert len(training_logs(trainer)) == 2
    for logs in training_logs(trainer):
        total = logs["loss_task"] + 2 * (logs["loss_hidden"] + logs["loss_prediction"])
        assert logs["loss"] == pytest.approx(total, rel=1e-5)
        assert logs["loss_hidden"] == pytest.approx(sum(logs[f"loss_hidden_{k}"] for k in range(3)), rel=1e-5)
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(evaluations) == 4
    assert not any("loss_task" in entry for entry in evaluations)


@pytest.mark.parametrize("logging_steps", [1, 100])
def test_a_broken_student_stops_training_by_name_and_step(tmp_path, logging_steps):
    student = bert()
    with torch.no_grad():
        student.bert.encoder.layer[1].output.dense.weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="`loss_(task|hidden_2)` must be finite, got nan by step 1"):
        distil(tmp_path, student, bert(1), logging_steps=logging_steps).train()


def test_a_broken_teacher_stops_training_at_the_first_step(tmp_path):
    student, teacher = bert(), bert(1)
    before = copy.deepcopy(student)
    with torch.no_grad():
        teacher.classifier.bias.fill_(math.inf)
    with pytest.raises(FloatingPointError, match="`teacher` must give finite `logits`.* first step"):
        distil(tmp_path, student, teacher).train()
    assert_equal_states(student, before)


# Refusals

NAMES = {"id2label": {0: "bad", 1: "fair", 2: "good"}, "label2id": {"bad": 0, "fair": 1, "good": 2}}
OTHER_ORDER = {"id2label": {0: "good", 1: "fair", 2: "bad"}, "label2id": {"good": 0, "fair": 1, "bad": 2}}


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        ({}, {"num_labels": 4}, "`num_labels` must be equal in student and teacher, got 3 and 4"),
        ({}, NAMES, "`id2label` must be equal.*set `config.id2label` and `config.label2id`"),
        (NAMES, OTHER_ORDER, "`id2label` must be equal in student and teacher, names and order"),
        (
            {"problem_type": "multi_label_classification"},
            {"problem_type": "single_label_classification"},
            "`problem_type` must be equal.*got multi_label_classification and single_label_classification",
        ),
        ({}, {"vocab_size": 41}, "`vocab_size` must be equal in student and teacher, got 40 and 41"),
        ({}, {"hidden_size": 16}, "`hidden_size` must be equal in student and teacher, got 8 and 16"),
        ({}, {"num_hidden_layers": 3}, r"`layer_map` must be set when the depths differ.*2 and a teacher of 3"),
    ],
)
def test_a_teacher_of_another_kind_is_refused(tmp_path, ours, theirs, message):
    with pytest.raises(ValueError, match=message):
        distil(tmp_path, bert(**ours), bert(1, **theirs))


@pytest.mark.parametrize("head", ["classifier", "words"])
@pytest.mark.parametrize(("ours", "theirs"), [(30, 32), (32, 30), (33, 40), (100, 128)])
def test_a_vocabulary_may_be_padded(tmp_path, head, ours, theirs):
    cls = {"classifier": BertForSequenceClassification, "words": BertForMaskedLM}[head]
    student, teacher = bert(cls=cls, vocab_size=ours), bert(1, cls=cls, vocab_size=theirs)
    data = [{"input_ids": row["input_ids"] % 30, "labels": row["labels"]} for row in rows()]
    if head == "words":
        data = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in data]
    trainer = distil(tmp_path, student, teacher, data=data)
    trainer.train()
    assert all(math.isfinite(log["loss_prediction"]) for log in trainer.state.log_history if "loss_prediction" in log)


def test_noise_for_the_student_alone_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`neftune_noise_alpha` must be None with a teacher, got 5"):
        distil(tmp_path, bert(), bert(1), neftune_noise_alpha=5)


@pytest.mark.parametrize("trained", [False, True])
def test_an_untrained_head_is_named(tmp_path, trained, monkeypatch):
    said = []
    monkeypatch.setattr("hf_moebert.architectures.heads.logger.warning", said.append)
    teacher = bert(1)
    torch.nn.init.constant_(teacher.classifier.bias, 0.1 if trained else 0.0)
    distil(tmp_path, bert(), teacher)
    assert len(said) == (not trained)
    assert all("`classifier` has a bias of zeros, and the student would follow a random one" in text for text in said)


def test_a_teacher_that_is_the_student_or_part_of_it_is_refused(tmp_path):
    student, teacher = bert(), bert(1)
    teacher.bert.embeddings = student.bert.embeddings
    for shared in (student, teacher):
        with pytest.raises(ValueError, match=r"share no parameter with the student, got `bert\.embeddings"):
            distil(tmp_path, student, shared)
    assert all(p.requires_grad for p in student.parameters())


def test_a_teacher_that_is_only_a_name_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`teacher` must be a loaded model, got 'bert-base-uncased'"):
        distil(tmp_path, bert(), "bert-base-uncased")


def test_a_tokenizer_with_more_tokens_than_the_models_is_refused(tmp_path):
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = special + [f"w{i}" for i in range(VOCAB - len(special) + 1)]
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    with pytest.raises(ValueError, match="`processing_class` must have at most the 40 tokens of the models, got 41"):
        DistillationTrainer(bert(), arguments(tmp_path), teacher=bert(1), processing_class=tokenizer)


def test_labels_that_contradict_the_teacher_are_refused(tmp_path):
    teacher = bert(1, problem_type="single_label_classification")
    with pytest.raises(ValueError, match="`problem_type` must be equal"):
        distil(tmp_path, bert(), teacher, data=rows("several")).train()


def test_masks_that_do_not_tell_padding_are_refused(tmp_path):
    student, batch = bert(), collate(rows())
    batch["attention_mask"] = torch.ones(8, 1, 9, 9)
    with pytest.raises(ValueError, match=r"`attention_mask` must have the shape \(batch, seq\).*got \(8, 1, 9, 9\)"):
        distil(tmp_path, student, bert(1)).compute_loss(student.train(), batch)
    trainer = distil(tmp_path, student, bert(1), DistillationConfig(mask_padding=False))
    assert trainer.compute_loss(student.train(), batch).isfinite()


def test_models_without_hidden_states_are_refused(tmp_path):
    class Silent(BertForSequenceClassification):
        def forward(self, **inputs):
            return super().forward(**inputs)[:1]

    student, teacher = bert(cls=Silent), bert(1)
    with pytest.raises(ValueError, match="`model` must return `hidden_states` and `logits`"):
        distil(tmp_path, student, teacher, remove_unused_columns=False).compute_loss(student.train(), collate(rows()))


# Checkpoints


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "per_device_train_batch_size": 2}
    whole, resumed = bert(dropout=0.2), bert(5, dropout=0.2)
    trainer = distil(tmp_path, whole, bert(1), **options)
    trainer.train()
    again = distil(tmp_path, resumed, bert(1), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_equal_states(whole, resumed)
    assert [logs["loss_hidden"] for logs in training_logs(again)] == [
        logs["loss_hidden"] for logs in training_logs(trainer)
    ]


def test_the_best_student_comes_back(tmp_path):
    student = bert()
    options = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 3}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "learning_rate": 5.0}
    trainer = distil(tmp_path, student, bert(1), eval_dataset=rows(), **options)
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert losses[-1] > min(losses)  # the last student is not the best
    assert trainer.evaluate()["eval_loss"] == min(losses)


def fine_tuned(folder, **config):
    """A teacher in a folder with the `trainer_state.json` of a longer run than ours."""
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 4}
    Trainer(bert(1, **config), arguments(folder, **options), data_collator=collate, train_dataset=rows()).train()
    checkpoint = folder / "checkpoint-4"
    assert json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] == 4
    return checkpoint


def test_a_teacher_with_a_trainer_state_does_not_shorten_the_run(tmp_path):
    teacher = BertForSequenceClassification.from_pretrained(fine_tuned(tmp_path / "teacher"))
    trainer = distil(tmp_path / "student", bert(), teacher, max_steps=3)
    assert trainer.train().global_step == 3
    assert [logs["step"] for logs in training_logs(trainer)] == [1, 2, 3]


def test_the_checkpoint_of_another_model_is_refused_before_anything_happens(tmp_path):
    folder = fine_tuned(tmp_path / "teacher")
    student = bert()
    before = copy.deepcopy(student)
    trainer = distil(tmp_path / "student", student, BertForSequenceClassification.from_pretrained(folder))
    with pytest.raises(ValueError, match="`resume_from_checkpoint` must not be the teacher's folder"):
        trainer.train(resume_from_checkpoint=str(folder))

    config = json.loads((folder / "config.json").read_text())
    for name, value in (("model_type", "roberta"), ("num_hidden_layers", 5)):
        (folder / "config.json").write_text(json.dumps(config | {name: value}))
        write_manifest(folder)
        trainer = distil(folder.parent, student, bert(1))
        for checkpoint in (str(folder), True):
            with pytest.raises(ValueError, match=rf"whose `{name}` is (bert|2), got {value} in .*checkpoint-4"):
                trainer.train(resume_from_checkpoint=checkpoint)
    assert_equal_states(student, before)
    assert trainer.state.global_step == 0


FOUR_STEPS = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of four steps with two checkpoints: its student and its folder."""
    student, folder = bert(), tmp_path_factory.mktemp("finished")
    distil(folder, student, bert(1), **FOUR_STEPS).train()
    return student, folder


@pytest.mark.parametrize("damage", ["missing", "empty", "half"])
def test_resuming_skips_a_checkpoint_whose_saving_was_cut_short(tmp_path, finished, damage):
    whole, folder = finished
    folder = shutil.copytree(folder, tmp_path / "run")
    state = folder / "checkpoint-4/trainer_state.json"
    state.unlink() if damage == "missing" else state.write_text("" if damage == "empty" else state.read_text()[:40])
    resumed = bert(5)
    distil(folder, resumed, bert(1), **FOUR_STEPS).train(resume_from_checkpoint=True)
    assert_equal_states(whole, resumed)
    for name in ("checkpoint-2", "checkpoint-4"):
        (folder / name / "trainer_state.json").unlink(missing_ok=True)
    with pytest.raises(ValueError, match="must find a complete checkpoint in .* which has none"):
        distil(folder, bert(5), bert(1), **FOUR_STEPS).train(resume_from_checkpoint=True)


# Two processes


def be_one_of_two(folder):
    found, options = {}, {"per_device_train_batch_size": 4}

    def describe(form, trainer):
        named = gradients(trainer) | {name: torch.tensor(value) for name, value in training_logs(trainer)[0].items()}
        found.update({f"{form} {name}": value for name, value in named.items()})

    describe("replicas", distil(folder, bert(), bert(1), **PLAIN_SGD, **options))
    for hidden in (True, False):
        describe(f"replicas embedder {hidden}", distil_embedder(folder, hidden, **options))
    projected = distil_embedder(folder, True, projection=True, **options)
    describe("projected", projected)
    found["projection"] = projected._projection.weight.detach()
    teacher = bert(1 + PartialState().process_index)  # as if only the first one had read the checkpoint
    options |= {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["BertLayer"]}}
    with sharding_on_a_cpu():
        for form in ("shards", "shards again"):
            describe(form, distil(folder, bert(), teacher, **PLAIN_SGD, **options))
        describe("shards embedder False", distil_embedder(folder, False, **options))
        with pytest.raises(ValueError, match="`hidden_states` must be False for models without head under FSDP2, got"):
            distil_embedder(folder, True, **options)
    assert {type(parameter) for parameter in teacher.parameters()} == {DTensor}
    leave(found, folder)


def distil_embedder(folder, hidden, projection=False, **options):
    # Without similarities the loss of a text is its own
    recipe = DistillationConfig(pooling="mean", similarity_weight=0.0, hidden_states=hidden, projection=projection)
    return distil(folder, bert(cls=BertModel), bert(1, BertModel), recipe, rows(None), **PLAIN_SGD, **options)


@pytest.mark.parametrize("kind", [DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM])
def test_sharding_by_other_means_than_fsdp2_is_refused(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(sharding, "AcceleratorState", lambda: SimpleNamespace(distributed_type=kind))
    with pytest.raises(ValueError, match=rf"which {kind.value}1? keeps in other shards. Use FSDP2 over all processes"):
        distil(tmp_path, bert(), bert(1))


@pytest.mark.process
def test_two_processes_find_the_gradients_of_one(tmp_path):
    run_in_two(__file__, tmp_path)
    first, second = read_both(tmp_path)
    trainer = distil(tmp_path, bert(), bert(1), **PLAIN_SGD)
    alone, logs = gradients(trainer), training_logs(trainer)[0]
    for hidden in (True, False):
        embedder = gradients(distil_embedder(tmp_path, hidden))
        alone |= {f"embedder {hidden} {name}": gradient for name, gradient in embedder.items()}
    projected = distil_embedder(tmp_path, True, projection=True)
    gradients(projected)
    torch.testing.assert_close(first["projection"], projected._projection.weight.detach())
    for form in ("replicas", "shards"):
        for name, gradient in alone.items():
            if form == "replicas" or not name.startswith("embedder True"):
                assert torch.equal(first[f"{form} {name}"], second[f"{form} {name}"]), name
                torch.testing.assert_close(first[f"{form} {name}"], gradient, atol=1e-6, rtol=1e-5)
        for name in ("loss", "loss_task", "loss_hidden", "loss_hidden_1", "loss_prediction"):
            assert first[f"{form} {name}"].item() == pytest.approx(logs[name], rel=1e-5)
            assert first[f"shards again {name}"] == first[f"shards {name}"]


if __name__ == "__main__":
    be_one_of_two(Path(sys.argv[1]))
