"""Two processes on one machine; run as a script, this file is one of them."""

import sys
from pathlib import Path

import pytest
import torch
from mom_runs import assert_same, make, make_args, make_data, make_trainer
from transformers import Trainer
from two_processes import leave, read_both, run_in_two


pytestmark = pytest.mark.process


RUNS = ("llama", "bert", "fixed")


def train(folder, run, batch_size):
    """Steps of eight examples with a clipping that bites; the last expert gets no token."""
    kind = "bert" if run == "bert" else "llama"
    model = make(kind, num_experts=3, router_aux_loss_coef=0.0)
    with torch.no_grad():
        for network in model.masked_networks().values():
            network.router.weight[2] = network.router.weight[1]  # a tie, which the lower index wins
    options = {"per_device_train_batch_size": batch_size, "ddp_find_unused_parameters": False, "max_grad_norm": 0.1}
    recipe = {"router_rate": 0.0, "score_rate": 0.3}
    if run == "fixed":
        model.fix_masks(0.5)
        for network in model.masked_networks().values():
            network.router.requires_grad_(False)
        args = make_args(folder, learning_rate=1e-4, **options)
        Trainer(model, args, train_dataset=make_data(kind)).train()
    else:
        make_trainer(folder, model, recipe, **options).train()
    return {f"{run}/{name}": tensor for name, tensor in model.state_dict().items()}


def be_one_of_two(folder):
    found = {}
    for run in RUNS:
        found |= train(folder, run, 4)
    leave(found, folder)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The final tensors of each of two processes."""
    folder = tmp_path_factory.mktemp("ranks")
    run_in_two(__file__, folder)
    return read_both(folder)


def of(run, tensors):
    return {name: tensor for name, tensor in tensors.items() if name.startswith(f"{run}/")}


@pytest.mark.parametrize("run", RUNS)
def test_two_processes_end_with_one_model(ranks, run):
    first, second = (of(run, rank) for rank in ranks)
    assert len(first) > 20
    assert_same(first, second)


@pytest.mark.parametrize("run", RUNS)
def test_two_processes_end_with_the_model_of_one(ranks, run, tmp_path):
    """Up to the squared gap, which is that of each process's own tokens."""
    torch.testing.assert_close(of(run, ranks[0]), train(tmp_path, run, 8), rtol=1e-2, atol=2e-3)


if __name__ == "__main__":
    be_one_of_two(Path(sys.argv[1]))
