"""Fixtures of the mask tests."""

import logging

import pytest
from transformers import logging as transformers_logging


@pytest.fixture
def caplog_of_transformers(caplog):
    """Capture the messages of transformers and this package, also those logged once per process."""
    logging.Logger.warning_once.cache_clear()
    transformers_logging.enable_propagation()
    yield caplog
    transformers_logging.disable_propagation()
