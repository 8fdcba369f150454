"""Tests of the benchmarks: their programs can be imported, and what they set for the process is set back."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from transformers.utils import logging


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path += [str(BENCHMARKS), str(BENCHMARKS / "studies")]  # at the end, so that they shadow nothing


@pytest.fixture(autouse=True)
def _process_settings(monkeypatch):
    """Leave the threads and the verbosity to the other tests as they were."""
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "1024")
    threads, verbosity, has_bars = torch.get_num_threads(), logging.get_verbosity(), logging.is_progress_bar_enabled()
    yield
    torch.set_num_threads(threads)
    logging.set_verbosity(verbosity)
    if has_bars:
        logging.enable_progress_bar()


@pytest.fixture
def run_study(monkeypatch, capsys):
    """Return a function that runs a program of benchmarks/studies in this process, and returns its output.

    Its pictures are made, but not drawn: to draw them takes a fifth of the time, and has tests of its own.
    """
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **options: Path(path).write_bytes(b"a picture"))

    def run(program, *arguments):
        monkeypatch.setattr(sys, "argv", [f"benchmarks/studies/{program}.py", *map(str, arguments)])
        importlib.import_module(program).main()
        return capsys.readouterr().out

    return run
