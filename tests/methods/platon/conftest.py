"""Fixtures of the pruning tests."""

import logging
from functools import partial

import platon_runs
import pytest
from platon_families import make_data
from transformers import logging as transformers_logging


@pytest.fixture
def tiny_bert():
    """A function that makes a fresh tiny classifier."""
    return platon_runs.make_bert


@pytest.fixture
def caplog_of_transformers(caplog):
    """Capture the messages of transformers and this package, also those logged once per process."""
    logging.Logger.warning_once.cache_clear()
    transformers_logging.enable_propagation()
    yield caplog
    transformers_logging.disable_propagation()


@pytest.fixture
def make_trainer(tmp_path):
    """A function that makes a Trainer, as `platon_runs.make_trainer`, in a folder of this test."""
    return partial(platon_runs.make_trainer, tmp_path / "run")


@pytest.fixture
def prune(make_trainer):
    """Prune a model with data that suit it, and return the trainer."""

    def prune(model, recipe=None, *, data="text", **options):
        trainer = make_trainer(model, recipe, **options)
        trainer.train_dataset = make_data(data) if isinstance(data, str) else data
        trainer.train()
        return trainer

    return prune
