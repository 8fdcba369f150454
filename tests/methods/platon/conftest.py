"""Fixtures of the pruning tests: tiny models, tiny data, and a Trainer that leaves no traces."""

import logging

import pytest
import torch
from datasets import Dataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments
from transformers import logging as transformers_logging

from hf_moebert.methods.platon import PlatonConfig, PlatonPruningCallback


TINY = {
    "vocab_size": 20,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
}


@pytest.fixture
def tiny_bert():
    """A fresh tiny classifier, always of the same weights; dropout off makes runs comparable."""

    def make(**changes):
        torch.manual_seed(0)
        dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        model = BertForSequenceClassification(BertConfig(**TINY | dropout | changes))
        model.accepts_loss_kwargs = False  # the stock head averages over a batch
        return model

    return make


@pytest.fixture
def tiny_data():
    """Sequences of equal length whose label is whether they begin with a small id."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(20, (64, 6), generator=generator)
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": (ids[:, 0] < 10).long().tolist()})


@pytest.fixture
def caplog_of_transformers(caplog):
    """Capture the messages of transformers and this package, also those logged once per process."""
    logging.Logger.warning_once.cache_clear()
    transformers_logging.enable_propagation()
    yield caplog
    transformers_logging.disable_propagation()


@pytest.fixture
def make_trainer(tmp_path, tiny_data):
    """A stock Trainer with the callback; keywords are training arguments, `pruning` those of the recipe."""

    def make(model, pruning=None, *, trainer_class=Trainer, callbacks=(), extra=None, **arguments):
        defaults = {
            "output_dir": str(tmp_path / "run"),
            "per_device_train_batch_size": 8,
            "max_steps": 20,
            "learning_rate": 1e-2,
            "save_strategy": "no",
            "logging_steps": 1,
            "use_cpu": True,
            "disable_tqdm": True,
            "seed": 0,
        }
        recipe = {"keep_ratio": 0.3, "initial_warmup": 2, "final_warmup": 6, "window": 3}
        callback = [] if pruning is False else [PlatonPruningCallback(PlatonConfig(**recipe | (pruning or {})))]
        return trainer_class(
            model=model,
            args=TrainingArguments(**defaults | arguments),
            train_dataset=tiny_data,
            eval_dataset=tiny_data,
            callbacks=[*callback, *callbacks],
            **(extra or {}),
        )

    return make
