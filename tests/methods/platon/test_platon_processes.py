"""Two processes that prune together; run as a script, this file is one of them."""

import os
import sys
from pathlib import Path

import pytest
import torch
from platon_runs import gather_state, make_bert, make_trainer
from safetensors.torch import load_file, save_file
from two_processes import run_in_two

from hf_moebert.methods.platon.training_selection import WeightSelector


pytestmark = pytest.mark.process


def prune(folder, batch_size, **recipe):
    options = {"per_device_train_batch_size": batch_size, "optim": "sgd", "max_grad_norm": 0.0}
    trainer = make_trainer(folder, make_bert(), recipe, **options)
    trainer.train()
    return trainer


def be_one_of_two(folder):
    found = {}
    for granularity in ("unstructured", "structured"):
        trainer = prune(folder / "run", 4, granularity=granularity)
        found |= {f"{granularity} {name}": tensor for name, tensor in gather_state(trainer).items()}
    rank = trainer.args.process_index
    assert trainer.args.world_size == 2
    save_file(found, folder / f"{rank}.safetensors")
    if rank == 1:
        update_masks_ = WeightSelector.update_masks_

        def keep_another_(self, masks, ratio):
            selection = update_masks_(self, masks, ratio)
            if ratio < 0.6:  # only after a while
                mask = next(iter(masks.values()))
                mask[5] = ~mask[5]
            return selection

        WeightSelector.update_masks_ = keep_another_
    try:
        prune(folder / "run", 4)
    except RuntimeError as error:
        (folder / f"{rank}.txt").write_text(str(error), encoding="utf-8")
    os._exit(0)  # taking down the group of a broken run in order may wait for the other process for ever


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The folder in which each of two processes left what it ended with."""
    folder = tmp_path_factory.mktemp("ranks")
    run_in_two(__file__, folder, timeout=120)
    return folder


@pytest.mark.parametrize("granularity", ["unstructured", "structured"])
def test_two_processes_prune_what_one_does_on_both_batches(ranks, tmp_path, granularity):
    first, second = (
        {name: t for name, t in load_file(ranks / f"{rank}.safetensors").items() if name.startswith(granularity)}
        for rank in range(2)
    )
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    alone = gather_state(prune(tmp_path, 8, granularity=granularity))
    assert first.keys() == {f"{granularity} {name}" for name in alone}
    for name, tensor in alone.items():
        kind = name.split()[0]
        if kind == "keep":
            assert torch.equal(first[f"{granularity} {name}"], tensor), name
        elif kind != "weight":  # what is zero but for rounding differs: the gradient of the keys' biases
            largest = max(float(other.max()) for key, other in alone.items() if key.startswith(kind))
            torch.testing.assert_close(first[f"{granularity} {name}"], tensor, rtol=1e-3, atol=largest * 1e-5)


@pytest.mark.parametrize("rank", [0, 1])
def test_processes_whose_masks_differ_all_stop(ranks, rank):
    assert "All processes must have the same mask, but at step" in (ranks / f"{rank}.txt").read_text(encoding="utf-8")


if __name__ == "__main__":
    be_one_of_two(Path(sys.argv[1]))
