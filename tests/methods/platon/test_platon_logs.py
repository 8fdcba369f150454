"""The best model, early stopping and logs of a pruning run."""

import math

import pytest
from platon_runs import StopAt, count_all_zeros
from transformers import EarlyStoppingCallback, TrainerCallback

from hf_moebert import PlatonPruningCallback


# The best model


class Metric:
    """Falls with every evaluation: the first one, dense, is always the best."""

    def __init__(self):
        self.value = 1.0

    def __call__(self, predictions):
        self.value -= 0.01
        return {"score": self.value}


BEST = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "save_strategy": "steps", "logging_steps": 5}
BEST |= {"load_best_model_at_end": True, "metric_for_best_model": "score", "greater_is_better": True}


def test_the_best_model_is_a_sparse_one(tiny_bert, make_trainer):
    trainer = make_trainer(tiny_bert(), extra={"compute_metrics": Metric()}, **BEST)
    trainer.train()
    assert trainer.state.best_global_step == 15  # the first of the final phase
    zeros, numel = count_all_zeros(trainer.model)
    assert zeros == round(0.7 * numel)


def test_a_ratio_of_one_leaves_the_choice_of_the_best_alone(tiny_bert, make_trainer):
    trainer = make_trainer(tiny_bert(), {"keep_ratio": 1.0}, extra={"compute_metrics": Metric()}, **BEST)
    trainer.train()
    assert trainer.state.best_global_step == 1


def test_early_stopping_waits_for_the_final_phase(tiny_bert, make_trainer):
    stop = EarlyStoppingCallback(early_stopping_patience=2)
    trainer = make_trainer(tiny_bert(), extra={"compute_metrics": Metric()}, callbacks=[stop], **BEST)
    trainer.train()
    assert trainer.state.global_step == 17
    zeros, numel = count_all_zeros(trainer.model)
    assert zeros == round(0.7 * numel)


def test_stopping_too_early_is_said(tiny_bert, make_trainer, monkeypatch):
    trainer = make_trainer(tiny_bert(), callbacks=[StopAt(9)])
    messages = []
    monkeypatch.setattr("hf_moebert.methods.platon.training.logger.warning", messages.append)
    trainer.train()
    assert any("before the final ratio 0.3 was reached" in message for message in messages)


# Logs


def test_logs(tiny_bert, make_trainer):
    class Reporter(TrainerCallback):
        seen = []

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.seen.append(dict(logs))

    trainer = make_trainer(tiny_bert(), callbacks=[Reporter()])
    trainer.train()
    for logs in (Reporter.seen[-2], trainer.state.log_history[-2]):
        assert logs["platon_ratio"] == pytest.approx(0.3)
        assert logs["platon_sparsity"] == pytest.approx(0.7, abs=1e-3)
        assert logs["platon_threshold"] > 0
        assert 0 <= logs["platon_revived"] < 0.5
    assert "platon_threshold" not in Reporter.seen[0]
    assert all(math.isfinite(v) for logs in Reporter.seen for v in logs.values() if isinstance(v, float))
    shares = {k: v for k, v in trainer.state.log_history[-2].items() if k.startswith("platon_sparsity/")}
    assert len(shares) == 12
    query = dict(trainer.model.named_parameters())["bert.encoder.layer.0.attention.self.query.weight"]
    assert shares["platon_sparsity/bert.encoder.layer.0.attention.self.query.weight"] == float(
        (query == 0).double().mean()
    )


def test_reporters_see_the_figures_of_a_callback_that_comes_first(tiny_bert, make_trainer):
    """The line of the README; the Trainer puts its reporters before the user's callbacks."""
    seen = []

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    trainer = make_trainer(tiny_bert())
    trainer.callback_handler.callbacks.insert(1, Reporter())
    trainer.callback_handler.callbacks.insert(0, trainer.pop_callback(PlatonPruningCallback))
    trainer.train()
    assert all("platon_sparsity" in logs for logs in seen)


def test_metrics_are_those_of_the_evaluation(tiny_bert, make_trainer):
    """Searches optimise them, and model cards print them."""
    trainer = make_trainer(tiny_bert(), eval_strategy="steps", eval_steps=5)
    trainer.train()
    assert not any(key.startswith("platon") for key in trainer.evaluate())
    for entry in trainer.state.log_history:
        assert "eval_loss" not in entry or not any(key.startswith("platon") for key in entry)
