"""Run Python in a new process that has torch and transformers imported already, and nothing of this package.

One process, the fork server of Python's `multiprocessing`, imports them once for all runs; each run is a fork of it,
which takes milliseconds where the imports take seconds. All runs have the environment of the server, for
huggingface_hub reads its settings when it is imported: they take the loopback server for the Hub.
"""

import gc
import os
import runpy
import shutil
import sys
from functools import cache
from multiprocessing import forkserver, get_context
from pathlib import Path
from subprocess import CompletedProcess
from tempfile import TemporaryDirectory
from unittest.mock import patch


PRELOADED = ["torch._dynamo", "transformers.pipelines", "transformers.trainer"]
PRELOADED += ["transformers.models.bert.modeling_bert", "peft"]


def run(code, *arguments, cwd=None, timeout=240, **variables):
    """Run code as `python -c` does, with an empty HF_HOME; a process that fails fails the test."""
    shutil.rmtree(start_server().home, ignore_errors=True)
    with TemporaryDirectory() as scratch:
        Path(scratch, "code.py").write_text(code)
        options = (scratch, [str(argument) for argument in arguments], cwd or os.getcwd(), variables)
        process = get_context("forkserver").Process(target=become, args=options)
        process.start()
        process.join(timeout)
        process.kill()  # one that has ended takes no harm
        process.join()
        output, errors = (Path(scratch, name).read_text() for name in ("stdout", "stderr"))
    assert process.exitcode == 0, errors
    return CompletedProcess(code, 0, output, errors)


@cache
def start_server():
    """Start the server, and return the Hub that its forks know."""
    import torch
    from loopback_hub import start_hub

    hub = start_hub()
    settings = {"PYTHONHASHSEED": "12345", "OMP_NUM_THREADS": str(torch.get_num_threads())}  # the same order of sums
    forkserver.set_forkserver_preload(PRELOADED)
    with patch.dict(os.environ, hub.environment() | settings):
        forkserver.ensure_running()
    return hub


def become(scratch, arguments, cwd, variables):
    """Run the code in this process, a fork of the server."""
    gc.freeze()  # or it copies all pages of the server when it collects garbage
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(Path(scratch, name), os.O_CREAT | os.O_WRONLY), number)
    os.environ |= variables
    os.chdir(cwd)
    sys.argv[1:] = arguments
    runpy.run_path(str(Path(scratch, "code.py")), run_name="__main__")
