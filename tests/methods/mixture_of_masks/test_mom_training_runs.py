"""The best model, logs, evaluation and options of a run that learns masks."""

import pytest
import torch
from mom_runs import (
    KINDS,
    Spy,
    assert_same,
    gather_state,
    logged,
    make,
    make_args,
    make_data,
    make_dense,
    make_trainer,
    scores_of,
    without_opinion,
)
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

from hf_moebert.methods.distillation import DistillationConfig, DistillationTrainer
from hf_moebert.methods.mixture_of_masks import MaskSparsityCallback, MaskSparsityConfig
from hf_moebert.methods.mixture_of_masks.functional import open_probability


# The best model


class Metric:
    """Falls with every evaluation: the first one, with all masks open, is always the best."""

    def __init__(self):
        self.value = 1.0

    def __call__(self, predictions):
        self.value -= 0.01
        return {"score": self.value}


BEST = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "save_strategy": "steps", "logging_steps": 5}
BEST |= {"load_best_model_at_end": True, "metric_for_best_model": "score", "greater_is_better": True}


def test_the_best_model_has_seen_the_final_target(tmp_path):
    model = make("bert")
    kept = {}
    spy = Spy("on_save", lambda state, **_: kept.update({state.global_step: scores_of(model).clone()}))
    recipe = {"keep_ratio": 0.99}  # where masks are from the start
    trainer = make_trainer(tmp_path, model, recipe, extra={"compute_metrics": Metric()}, callbacks=[spy], **BEST)
    trainer.train()
    assert trainer.state.best_global_step == 7  # the ramp takes 6, and the 7th step is the first with all of it
    assert torch.equal(scores_of(model), kept[7])
    assert not torch.equal(kept[7], kept[12])


def test_a_model_that_is_far_from_the_target_is_not_the_best(tmp_path):
    trainer = make_trainer(tmp_path, make("bert"), extra={"compute_metrics": Metric()}, **BEST)
    trainer.train()
    assert abs(trainer.model.budget.sparsity - 0.5) > 0.02
    assert trainer.state.best_global_step == 12  # the last one, after which nobody asked again


def test_nothing_to_close_leaves_the_choice_of_the_best_alone(tmp_path):
    extra = {"compute_metrics": Metric()}
    trainer = make_trainer(tmp_path, make("bert"), {"keep_ratio": 1.0}, extra=extra, **BEST)
    trainer.train()
    assert trainer.state.best_global_step == 1


def test_early_stopping_waits_for_the_final_target(tmp_path, caplog_of_transformers):
    stop = EarlyStoppingCallback(early_stopping_patience=2)
    extra = {"compute_metrics": Metric()}
    trainer = make_trainer(tmp_path, make("bert"), {"keep_ratio": 0.99}, extra=extra, callbacks=[stop], **BEST)
    trainer.train()
    assert trainer.state.global_step == 9
    trainer = make_trainer(tmp_path, make("bert"), max_steps=8)
    trainer.train()
    assert "a sparsity of" in caplog_of_transformers.text  # a ramp of four steps is too short for the masks


def test_stopping_on_the_way_is_said(tmp_path, caplog_of_transformers):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 4

    make_trainer(tmp_path, make(), {"keep_ratio": 0.999}, callbacks=[Stop()]).train()
    assert "Training stopped after 4 steps, and the final model has a sparsity of 0.0" in caplog_of_transformers.text
    assert "instead of 0.001. Train longer" in caplog_of_transformers.text


# Logs and evaluation


def test_logs(tmp_path):
    heard = []
    spy = Spy("on_log", lambda state, logs, **_: heard.append(dict(logs)))
    model = make(num_experts=3)
    trainer = make_trainer(tmp_path, model, {"score_rate": 0.4}, callbacks=[spy], max_steps=30, logging_steps=10)
    trainer.train()
    trainer.evaluate()
    assert not any(name.startswith("mom_") for name in heard[-1])
    for logs in (heard[2], trainer.state.log_history[2]):
        assert logs["mom_target"] == 0.5
        assert 0.1 < logs["mom_sparsity"] < 1
        assert 1 / 3 <= logs["mom_load"] <= 1
    assert not any("/" in name for logs in heard for name in logs)
    last = trainer.state.log_history[-2]  # of the training as a whole
    assert "train_loss" in last
    masks = torch.stack([n.masks.settled() for n in model.masked_networks().values()])
    assert last["mom_active"] == pytest.approx(float((masks > 0).float().mean()))
    assert 0 < last["mom_active"] < 1
    for block, scores in enumerate(scores_of(model)):
        assert last[f"mom_open/{block}"] == pytest.approx(float(open_probability(scores).mean()))
        counts = {kind: last[f"mom_{kind}/{block}"] for kind in ("shared", "specific", "inactive")}
        assert counts == dict(zip(counts, model.count_units()[f"model.layers.{block}.mlp"].values(), strict=True))
        assert sum(counts.values()) == 24
    assert len(trainer.state.log_history) == 5


def test_open_shares_are_logged_without_noise(tmp_path):
    """All scores are well above where a mask without noise closes, yet noise closes some of them."""
    model = without_opinion(make())
    for network in model.masked_networks().values():
        network.masks.scores.data -= 4
    trainer = make_trainer(tmp_path, model, {"score_rate": 0.0}, max_steps=3)
    trainer.train()
    assert logged(trainer, "mom_active") == [1.0] * 3
    assert [entry["mom_shared/0"] for entry in trainer.state.log_history if "loss" in entry] == [24] * 3


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_of_evaluation_is_the_stock_one(tmp_path, kind):
    model, dense, data = make(kind), make_dense(kind), make_data(kind, padded=kind != "t5")
    with torch.no_grad():
        model.budget.multipliers.fill_(7.0)
        model.budget.target = 0.5
    trainer = make_trainer(tmp_path, model, data=data)
    stock = Trainer(dense, make_args(tmp_path), eval_dataset=data)
    assert trainer.evaluate()["eval_loss"] == stock.evaluate()["eval_loss"]
    found, expected = trainer.predict(data), stock.predict(data)
    logits, theirs = ((p[0] if isinstance(p, tuple) else p) for p in (found.predictions, expected.predictions))
    assert (logits == theirs).all()
    assert found.metrics["test_loss"] == expected.metrics["test_loss"]


def test_training_lowers_the_loss_while_masks_close(tmp_path):
    model = make(num_experts=2)
    trainer = make_trainer(tmp_path, model, learning_rate=2e-2, max_steps=60, logging_steps=60)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 1
    assert open_probability(scores_of(model)).mean() < 0.8


# What else a run can be


def checkpointing(**options):
    return {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": options}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing", "ignore:`is_gradient")
def test_checkpointed_activations_change_nothing(tmp_path):
    plain = make_trainer(tmp_path, make())
    trainer = make_trainer(tmp_path, make(), **checkpointing(use_reentrant=False))
    plain.train()
    trainer.train()
    assert_same(gather_state(trainer), gather_state(plain))
    assert logged(trainer, "mom_load") == logged(plain, "mom_load")
    with pytest.raises(ValueError, match="`use_reentrant` must be False with gradient checkpointing"):
        make_trainer(tmp_path, make(), **checkpointing(use_reentrant=True)).train()


@pytest.mark.parametrize("options", [{"group_size": 4}, {"layers": [1]}, {"num_experts": 3, "top_k": 2}], ids=str)
def test_options_of_masks(tmp_path, options):
    model = make(**options)
    before = scores_of(model).clone()
    trainer = make_trainer(tmp_path, model, {"score_rate": 0.4}, max_steps=30, logging_steps=30)
    trainer.train()
    assert before.shape == (
        2 - ("layers" in options),
        options.get("num_experts", 2),
        24 // options.get("group_size", 1),
    )
    assert float(model.budget.sparsity.mean()) > 0.3
    model.fix_masks(0.5)
    assert trainer.evaluate()["eval_loss"] > 0


def test_a_student_learns_masks_from_its_dense_teacher(tmp_path):
    extra = {"teacher": make_dense(), "distillation": DistillationConfig(hidden_states=False)}
    model = make(num_experts=2)
    recipe = {"score_rate": 0.3}
    trainer = make_trainer(tmp_path, model, recipe, trainer=DistillationTrainer, extra=extra, max_steps=30)
    trainer.train()
    assert logged(trainer, "loss_prediction")[0] >= 0
    assert float(model.budget.sparsity.mean()) > 0.3
    assert logged(trainer, "mom_sparsity")[0] < 0.02


def test_two_stages_and_a_compact_model(tmp_path):
    """The whole way, with the stock Trainer in each stage."""
    model = make(num_experts=2)
    make_trainer(tmp_path, model, {"score_rate": 0.2}, max_steps=30, logging_steps=30).train()
    model.fix_masks(0.5)
    fixed = [network.masks.is_open.clone() for network in model.masked_networks().values()]
    trainer = Trainer(
        model, make_args(tmp_path, learning_rate=1e-2), train_dataset=make_data(), eval_dataset=make_data()
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    now = [network.masks.is_open for network in model.masked_networks().values()]
    assert all(torch.equal(a, b) for a, b in zip(now, fixed, strict=True))
    assert sum(int(m.sum()) for m in now) == sum(m.numel() for m in now) // 2


def test_the_recipe_by_default():
    assert MaskSparsityCallback().config == MaskSparsityConfig()
