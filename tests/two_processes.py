"""Run a test file as a script in two processes that train together, and read what each of them left.

A new process imports what the test file imports and forks: the two need not import it again.
"""

import gc
import os
import runpy
import signal
import socket
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import new_process
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file


FORK_BOTH = """
import sys, torch, two_processes
torch.set_num_threads(1)
sys.exit(two_processes.fork_both(*sys.argv[1:]))
"""


def run_in_two(script, folder, *, timeout=240):
    """Run a script with a folder as its argument; a process that fails fails the test."""
    new_process.run(
        FORK_BOTH,
        *(script, folder),
        timeout=timeout,
        ACCELERATE_USE_CPU="true",
    )


def leave(tensors, folder):
    """Save what this process ended with, and take its leave of the other."""
    state = PartialState()
    assert state.num_processes == 2
    save_file(tensors, folder / f"{state.process_index}.safetensors")
    state.destroy_process_group()


@contextmanager
def sharding_on_a_cpu():
    """Let accelerate shard by FSDP2 here, too: on a CPU it leaves `fsdp` out without a word."""
    initialise = AcceleratorState.__init__

    def take_for_accelerators(self, *args, **kwargs):
        if PartialState().distributed_type is DistributedType.MULTI_CPU:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        initialise(self, *args, **kwargs)

    with patch.object(AcceleratorState, "__init__", take_for_accelerators), patch.dict(os.environ):
        yield


def read_both(folder):
    """Return what the two processes left, by rank."""
    return [load_file(folder / f"{rank}.safetensors") for rank in range(2)]


def fork_both(script, *arguments):
    """Import what a script needs, run it in two processes, and return the exit code of the first that fails, or 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="imported")
    gc.freeze()  # or both copy all pages when they collect garbage
    children = set()
    for rank in range(2):
        child = os.fork()
        if child == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            runpy.run_path(script, run_name="__main__")
            sys.exit()
        children.add(child)
    while children:
        child, status = os.wait()
        children.remove(child)
        if code := os.waitstatus_to_exitcode(status):
            for other in children:  # it would wait for the one that failed
                os.kill(other, signal.SIGTERM)
            return code
    return 0
