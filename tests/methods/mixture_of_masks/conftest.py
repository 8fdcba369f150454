"""What the host and this package said."""

import logging

import pytest
from transformers import logging as host_logging


@pytest.fixture
def caplog_of_transformers(caplog):
    """Also what they say once per process."""
    logging.Logger.warning_once.cache_clear()
    host_logging.enable_propagation()
    yield caplog
    host_logging.disable_propagation()
