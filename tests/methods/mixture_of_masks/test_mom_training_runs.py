"""The best model, logs, evaluation and options of a run that learns masks."""

import re
from pathlib import Path

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

from hf_moebert.methods import mixture_of_masks
from hf_moebert.methods.distillation import DistillationConfig, DistillationTrainer
from hf_moebert.methods.mixture_of_masks import MaskSparsityCallback, MaskSparsityConfig, shrink
from hf_moebert.methods.mixture_of_masks.functional import open_probability


README = Path(mixture_of_masks.__file__).parent / "README.md"


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


EARLY = {"ramp_share": 0.25, "learn_share": 0.5}  # the sixth step is the last to learn masks


def test_the_best_model_has_fixed_masks(tmp_path):
    model = make("bert")
    kept = {}
    spy = Spy("on_save", lambda state, **_: kept.update({state.global_step: scores_of(model).clone()}))
    trainer = make_trainer(tmp_path, model, EARLY, extra={"compute_metrics": Metric()}, callbacks=[spy], **BEST)
    trainer.train()
    assert trainer.state.best_global_step == 6
    assert torch.equal(scores_of(model), kept[6])
    assert not torch.equal(kept[5], kept[6])


def test_nothing_to_close_leaves_the_choice_of_the_best_alone(tmp_path):
    extra = {"compute_metrics": Metric()}
    trainer = make_trainer(tmp_path, make("bert"), {"keep_ratio": 1.0}, extra=extra, **BEST)
    trainer.train()
    assert trainer.state.best_global_step == 1


def test_early_stopping_waits_for_fixed_masks(tmp_path, caplog_of_transformers):
    stop = EarlyStoppingCallback(early_stopping_patience=2)
    extra = {"compute_metrics": Metric()}
    trainer = make_trainer(tmp_path, make("bert"), EARLY, extra=extra, callbacks=[stop], **BEST)
    trainer.train()
    assert trainer.state.global_step == 8
    assert "Training stopped" not in caplog_of_transformers.text


def test_stopping_on_the_way_is_said(tmp_path, caplog_of_transformers):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    make_trainer(tmp_path, make(), callbacks=[Stop()]).train()
    assert "Training stopped after 3 steps, before masks were fixed, and the" in caplog_of_transformers.text
    assert "a sparsity of 0.250 instead of 0.500. Train to the end" in caplog_of_transformers.text


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
        assert logs["mom_sparsity"] == pytest.approx(0.5, abs=1e-3)
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
    """Noise closes a tenth of the masks, and without it all are open."""
    model = without_opinion(make())
    trainer = make_trainer(tmp_path, model, {"score_rate": 0.0, "keep_ratio": 0.9, "ramp_share": 0.1}, max_steps=10)
    trainer.train()
    assert logged(trainer, "mom_sparsity")[:9] == pytest.approx([0.1] * 9, abs=1e-4)
    assert logged(trainer, "mom_active")[:9] == [1.0] * 9
    assert [entry["mom_shared/0"] for entry in trainer.state.log_history if "loss" in entry][:9] == [24] * 9


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_of_evaluation_is_the_stock_one(tmp_path, kind):
    model, dense, data = make(kind), make_dense(kind), make_data(kind, padded=kind != "t5")
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
    assert open_probability(scores_of(model)).mean() == pytest.approx(0.5, abs=1e-3)


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
    assert float(model.measure_sparsity().mean()) == pytest.approx(0.5, abs=1e-3)
    model.fix_masks(0.5)
    assert trainer.evaluate()["eval_loss"] > 0


@pytest.mark.parametrize("hidden_states", [True, False])
def test_a_student_learns_masks_and_recovers_by_its_dense_teacher(tmp_path, hidden_states):
    """In one run, on texts without labels."""
    data = make_data().remove_columns("labels")
    extra = {"teacher": make_dense(), "distillation": DistillationConfig(hidden_states=hidden_states)}
    options = {"trainer": DistillationTrainer, "extra": extra, "max_steps": 40, "learning_rate": 1e-2, "data": data}
    model = make(num_experts=1)
    trainer = make_trainer(tmp_path, model, {"ramp_share": 0.2, "learn_share": 0.3}, **options)
    trainer.train()
    losses = logged(trainer, "loss_prediction")
    assert sum(losses[-5:]) < 0.7 * sum(losses[12:17])  # since masks are fixed
    assert ("loss_hidden" in trainer.state.log_history[0]) == hidden_states
    small = shrink(model.fix_masks(0.5))
    assert small.num_parameters() < make_dense().num_parameters()


def test_the_snippet_of_the_readme_runs(tmp_path, monkeypatch):
    """On a tiny model and data, every third unit of which is left."""
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(re.search(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)[1], scope)
    small = scope["compress"](make_dense(), make_data(), make_args(tmp_path), keep_ratio=1 / 3)
    assert sum(width for width, _ in map(small.config.block_sizes, range(2))) == 2 * 24 // 3


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
