"""Pruning and kept zeros beside the optimizers that transformers offers."""

import pytest
import torch
from platon_families import build, make_data
from platon_runs import SaveAt, assert_same_weights, count_all_zeros
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification
from transformers.training_args import OptimizerNames

from hf_moebert import (
    CheckpointManifestCallback,
    DistillationConfig,
    DistillationTrainer,
    PlatonConfig,
    last_complete_checkpoint,
    prune_structured,
    shrink,
)
from hf_moebert.methods.platon import KeepZerosCallback
from hf_moebert.methods.platon.modeling_units import find_unit_groups
from hf_moebert.methods.platon.training_parameters import find_prunable


PLAIN = ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop", "stable_adamw"]
AVERAGING = ["schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd"]


class Averaging(torch.optim.SGD):
    """Evaluates the mean of all weights it has trained."""

    def __init__(self, parameters):
        super().__init__(parameters, lr=0.01)

    def train(self):
        pass

    def eval(self):
        pass


def make_optimizer(trainer, name):
    if name == "own":
        trainer.optimizer = Averaging(trainer.model.parameters())


def zeros_after_evaluating_and_saving(trainer, folder):
    trainer.evaluate()
    trainer.save_model(folder)
    zeros, numel = count_all_zeros(AutoModelForSequenceClassification.from_pretrained(folder))
    assert (zeros, numel) == count_all_zeros(trainer.model)
    return zeros / numel


def test_the_optimizers_are_those_of_transformers():
    assert set(PLAIN + AVERAGING) <= {name.value for name in OptimizerNames}


@pytest.mark.parametrize("optim", PLAIN)
@pytest.mark.parametrize("criterion", ["platon", "movement"])
def test_zeros_outlive_evaluating_and_saving(tiny_bert, make_trainer, tmp_path, optim, criterion):
    if optim == "stable_adamw":
        pytest.importorskip("optimi")
    trainer = make_trainer(tiny_bert(), {"criterion": criterion}, optim=optim)
    trainer.train()
    assert zeros_after_evaluating_and_saving(trainer, tmp_path / "saved") == pytest.approx(0.7, abs=1e-3)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("optim", [*AVERAGING, "own"])
def test_optimizers_that_evaluate_averages_are_refused(tiny_bert, make_trainer, optim, keep):
    if optim in AVERAGING:
        pytest.importorskip("schedulefree")
    more = {"optim": optim} if optim in AVERAGING else {"lr_scheduler_type": "constant"}
    if keep:
        trainer = make_trainer(tiny_bert(), False, callbacks=[KeepZerosCallback()], **more)
    else:
        trainer = make_trainer(tiny_bert(), **more)
    make_optimizer(trainer, optim)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    with pytest.raises(ValueError, match=r"weights that are .*, but .* evaluates and saves averages of them. Train"):
        trainer.train()
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items())


# A pruned model is trained on


@torch.no_grad()
def pruned(family, form):
    """A model of which half of the weights, two of every four, or some units are zero."""
    model = build(family)
    if form == "units":
        for group in find_unit_groups(model):
            group.writer.weight.unflatten(1, (group.num_units, group.unit_size))[:, 1::2] = 0
        return model
    for matrix in find_prunable(model, PlatonConfig()).values():
        (matrix.unflatten(-1, (-1, 4)) if form == "2:4" else matrix)[..., ::2] = 0
    return model


FORMS = [*((family, "weights") for family in ("bert", "gpt2", "vit", "hash", "albert")), ("bert", "2:4")]
FORMS += [("bert", "units"), ("vit", "units"), ("distilbert", "units")]


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
@pytest.mark.parametrize(("family", "form"), FORMS)
def test_zeros_are_kept(make_trainer, family, form, optim):
    model = pruned(family, form)
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    where = {n: p == 0 for n, p in find_prunable(model, PlatonConfig()).items() if not p.all()}
    trainer = make_trainer(model, False, callbacks=[KeepZerosCallback()], optim=optim, weight_decay=0.1, max_steps=6)
    trainer.train_dataset = make_data("vit" if family == "vit" else "text")
    trainer.train()
    assert where
    assert all(not model.get_parameter(name)[zeros].any() for name, zeros in where.items())
    assert all((model.get_parameter(name) != before[name]).any() for name in where)
    if form == "units":
        assert shrink(model).num_parameters() < model.num_parameters()


def widths_of(model):
    return [group.num_units for group in find_unit_groups(shrink(model))]


def test_another_task_keeps_the_units_of_the_first(make_trainer, tmp_path):
    pruned("bert", "units").save_pretrained(tmp_path / "first")
    model = BertForSequenceClassification.from_pretrained(
        tmp_path / "first", num_labels=3, ignore_mismatched_sizes=True
    )  # a new head
    widths = widths_of(model)
    trainer = make_trainer(model, False, callbacks=[KeepZerosCallback()], max_steps=6)
    trainer.train_dataset = trainer.train_dataset.map(lambda row: {"labels": row["input_ids"][0] % 3})
    trainer.train()
    assert widths_of(model) == widths == [16, 2] * 2


@pytest.mark.parametrize("form", ["weights", "units"])
def test_a_teacher_leaves_the_zeros_alone(make_trainer, form):
    model, teacher = pruned("bert", form), build("bert")
    where = {n: p == 0 for n, p in find_prunable(model, PlatonConfig()).items() if not p.all()}
    extra = {"teacher": teacher, "distillation": DistillationConfig()}
    callbacks = [KeepZerosCallback()]
    make_trainer(
        model, False, trainer_class=DistillationTrainer, callbacks=callbacks, extra=extra, max_steps=6
    ).train()
    assert all(not model.get_parameter(name)[zeros].any() for name, zeros in where.items())
    assert any((model.get_parameter(name) != build("bert").get_parameter(name)).any() for name in where)


def test_a_model_pruned_in_one_shot_is_trained_on(make_trainer):
    model = prune_structured(
        build("bert"), make_data("text").remove_columns("labels"), keep_ratio=0.5, multiple_of=1, remove=False
    )
    widths = widths_of(model)
    make_trainer(model, False, callbacks=[KeepZerosCallback()], max_steps=6).train()
    assert widths_of(model) == widths
    assert min(widths) < 32


def test_a_resumed_run_keeps_the_zeros_of_its_checkpoint(make_trainer, tmp_path):
    def make(folder, **options):
        callbacks = [KeepZerosCallback(), SaveAt([4]), CheckpointManifestCallback()]
        return make_trainer(pruned("bert", "weights"), False, callbacks=callbacks, output_dir=str(tmp_path / folder))

    whole = make("whole")
    whole.train()
    resumed = make("whole")
    resumed.train(resume_from_checkpoint=str(last_complete_checkpoint(tmp_path / "whole")))
    assert_same_weights(resumed.model, whole.model)


def test_a_model_without_zeros_is_refused(tiny_bert, make_trainer):
    with pytest.raises(ValueError, match="`model` must have zeros to keep, got a BertForSequenceClassification"):
        make_trainer(tiny_bert(), False, callbacks=[KeepZerosCallback()]).train()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # asked by peft
def test_adapters_are_refused(make_trainer):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(pruned("bert", "weights"), peft.LoraConfig(task_type="SEQ_CLS"))
    with pytest.raises(ValueError, match="`model` must be the pruned one alone, got adapters"):
        make_trainer(model, False, callbacks=[KeepZerosCallback()]).train()
