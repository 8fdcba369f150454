"""Runs that are killed while they save, and their resumption."""

import gc
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import new_process
import pytest
import torch
from platon_runs import gather_state, make_bert, make_trainer
from safetensors.torch import load_file, save_file
from transformers import Trainer

from hf_moebert import last_complete_checkpoint
from hf_moebert.checkpoints import tensor_files
from hf_moebert.methods.platon import PlatonPruningCallback


def make_run(folder):
    return make_trainer(folder, make_bert(), save_strategy="steps", save_steps=1)


def die_at(place, step):
    """Kill this very process in the middle of saving the checkpoint of a step."""

    def dying(function):
        def call(*args, **kwargs):
            made = Path(run).glob("checkpoint-*")
            if max((int(path.name.split("-")[1]) for path in made), default=0) >= step:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    run = sys.argv[1]
    if place == "before the state":
        PlatonPruningCallback.save_state = dying(PlatonPruningCallback.save_state)
    elif place == "before the state has its name":
        tensor_files.os.fsync = dying(tensor_files.os.fsync)
    else:
        Trainer._save_optimizer_and_scheduler = dying(Trainer._save_optimizer_and_scheduler)


def crash_again_and_again(folder):
    """Train without a crash, then in one child after the other, each killed and the next resumed."""
    whole = make_trainer(folder.with_name("whole"), make_bert())
    whole.train()
    save_file(gather_state(whole), folder / "whole.safetensors")
    gc.freeze()  # or each child copies all pages when it collects garbage
    chance = random.Random(0)
    begun, ends = [], []
    places = ["before the state", None, "before the state has its name", "before the optimizer", None]
    for number, place in enumerate([*places, "no crash"]):
        checkpoint = last_complete_checkpoint(str(folder)) if number else None
        begun.append(int(checkpoint.rpartition("-")[2]) if checkpoint else 0)
        child = os.fork()  # of a process that has imported everything, and has trained
        if not child:
            if place not in (None, "no crash"):
                die_at(place, begun[-1] + 3)
            trainer = make_run(folder)
            trainer.train(resume_from_checkpoint=checkpoint)
            save_file(gather_state(trainer), folder / "end.safetensors")
            os._exit(0)
        if place is None:
            while not (folder / f"checkpoint-{begun[-1] + 2}").exists():
                time.sleep(0.001)
            time.sleep(chance.random() / 10)
            os.kill(child, signal.SIGKILL)
        ends.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    print(json.dumps({"begun": begun, "ends": ends}))


CRASH = """
import pathlib, sys
import torch
from test_platon_crashes import crash_again_and_again
torch.set_num_threads(1)
crash_again_and_again(pathlib.Path(sys.argv[1]))
"""


@pytest.mark.process
def test_a_run_that_is_killed_while_it_saves_ends_like_any_other(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    done = new_process.run(CRASH, folder)
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["ends"] == [-signal.SIGKILL] * 5 + [0]
    assert report["begun"] == sorted(report["begun"])
    assert report["begun"][1] == 2  # checkpoint 3 has no state, so it does not count
    end, whole = (load_file(folder / f"{name}.safetensors") for name in ("end", "whole"))
    assert [name for name in whole if not torch.equal(end[name], whole[name])] == []
    assert any(name.startswith("keep") and not tensor.all() for name, tensor in end.items())
