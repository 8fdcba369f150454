"""Run a test file as a script in two processes that train together, and read what each of them left."""

import os
import subprocess
import sys
from pathlib import Path

from accelerate import PartialState
from safetensors.torch import load_file, save_file


TESTS = Path(__file__).parent


def run_in_two(script, folder, *, timeout=240):
    """Run a script with a folder as its argument; a process that fails fails the test."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    paths = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [*launcher, script, str(folder)],
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def leave(tensors, folder):
    """Save what this process ended with, and take its leave of the other."""
    state = PartialState()
    assert state.num_processes == 2
    save_file(tensors, folder / f"{state.process_index}.safetensors")
    state.destroy_process_group()


def read_both(folder):
    """Return what the two processes left, by rank."""
    return [load_file(folder / f"{rank}.safetensors") for rank in range(2)]
