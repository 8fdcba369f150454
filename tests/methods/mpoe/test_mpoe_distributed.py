"""Two processes on one machine; run as a script, this file is one of them."""

import sys
from pathlib import Path

import pytest
import torch
from tiny_mpoe import make, make_args, make_examples
from transformers import Trainer
from two_processes import leave, read_both, run_in_two

from hf_moebert.methods.mpoe import MPOEGradientMaskCallback, MPOEGradientMaskConfig


pytestmark = pytest.mark.process
RUNS = ("none", "tensor", "element")


def train(folder, granularity, batch_size):
    """Three steps of four examples with a clipping that bites; the last experts get no token."""
    model = make("bert")
    with torch.no_grad():
        for network in model.networks().values():
            network.router.bias[2:] = -1e9
    callbacks = []
    if granularity != "none":
        callbacks = [MPOEGradientMaskCallback(MPOEGradientMaskConfig(keep=0.5, granularity=granularity))]
    options = {"max_grad_norm": 0.1, "learning_rate": 1e-3, "ddp_find_unused_parameters": False, "max_steps": 4}
    args = make_args(folder, per_device_train_batch_size=batch_size, **options)
    trainer = Trainer(model, args, train_dataset=make_examples("bert"), callbacks=callbacks)
    trainer.train()
    return {f"{granularity}/{name}": tensor for name, tensor in model.state_dict().items()}


def be_one_of_two(folder):
    found = {}
    for granularity in RUNS:
        found |= train(folder, granularity, 2)
    leave(found, folder)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Return the tensors that each of two processes ended with."""
    folder = tmp_path_factory.mktemp("ranks")
    run_in_two(__file__, folder)
    return read_both(folder)


@pytest.mark.parametrize("run", RUNS)
def test_two_processes_end_with_one_model(ranks, run):
    first, second = ({name: rank[name] for name in rank if name.startswith(f"{run}/")} for rank in ranks)
    assert len(first) > 50
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("run", RUNS)
def test_two_processes_end_with_the_model_of_one(ranks, run, tmp_path):
    torch.testing.assert_close(
        {name: tensor for name, tensor in ranks[0].items() if name.startswith(f"{run}/")},
        train(tmp_path, run, 4),
        rtol=1e-3,
        atol=2e-4,
    )


if __name__ == "__main__":
    be_one_of_two(Path(sys.argv[1]))
