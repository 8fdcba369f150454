"""Two processes that prune together; run as a script, this file is one of them."""

import os
import sys
from pathlib import Path

import pytest
import torch
from platon_runs import RECIPE, TINY, SaveAt, gather_state, make_bert, make_trainer, pruner_of
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from two_processes import run_in_two, sharding_on_a_cpu

from hf_moebert import MoEBertConfig, MoEBertForSequenceClassification
from hf_moebert.methods.platon import KeepZerosCallback, PlatonConfig
from hf_moebert.methods.platon.training_parameters import find_prunable
from hf_moebert.methods.platon.training_pruner import Pruner
from hf_moebert.methods.platon.training_selection import WeightSelector


pytestmark = pytest.mark.process

STEPS = 12
SHARDED = {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["BertLayer"]}}
ODD = {"intermediate_size": 33}  # the rows of two processes are not as many
RUNS = {  # of sharded models, by granularity: the model and what else the recipe says
    "unstructured": (lambda: make_experts(), {"min_keep": 0.05}),
    "2:4": (lambda: make_bert(), {"keep_ratio": 0.5}),
    "structured": (lambda: make_bert(**ODD), {}),
}


def make_experts():
    torch.manual_seed(0)
    config = MoEBertConfig(**TINY, num_experts=3, expert_size=10, num_shared_neurons=2, routing="hash-random")
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    model = MoEBertForSequenceClassification(config)
    model.accepts_loss_kwargs = False
    return model


def prune(folder, batch_size, **recipe):
    options = {"per_device_train_batch_size": batch_size, "max_steps": STEPS, "optim": "sgd", "max_grad_norm": 0.0}
    trainer = make_trainer(folder, make_bert(), recipe, **options)
    trainer.train()
    return trainer


def prune_rows(folder, batch_size, granularity, resume=None, **arguments):
    make, recipe = RUNS[granularity]
    options = {"per_device_train_batch_size": batch_size, "max_steps": STEPS}
    recipe = {"granularity": granularity, **recipe}
    trainer = make_trainer(folder, make(), recipe, callbacks=[SaveAt([8])], **options | arguments)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def describe(trainer):
    """Return what a checkpoint would hold now, of all processes; in the first one."""
    state, tensors = pruner_of(trainer).collect(STEPS)
    numbers = {f"number {name}": torch.tensor(value).double() for name, value in state["numbers"].items()}
    return tensors | numbers | {"weights": torch.tensor(state["weights"])}


def make_sparse():
    model = make_bert()
    for parameter in find_prunable(model, PlatonConfig()).values():
        parameter.detach()[:, ::3] = 0
        parameter.detach()[0] = 0
    return model


def keep_zeros(folder, **arguments):
    trainer = make_trainer(folder, make_sparse(), False, callbacks=[KeepZerosCallback()], max_steps=2, **arguments)
    trainer.train()
    state = trainer.model.state_dict()
    return {name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for name, tensor in state.items()}


def be_one_of_two(folder):
    found = {f"replicas {name}": tensor for name, tensor in keep_zeros(folder / "run").items()}
    for granularity in ("unstructured", "structured"):
        trainer = prune(folder / "run", 4, granularity=granularity)
        found |= {f"{granularity} {name}": tensor for name, tensor in gather_state(trainer).items()}
    rank = trainer.args.process_index
    assert trainer.args.world_size == 2
    with sharding_on_a_cpu():
        found |= {f"shards {name}": tensor for name, tensor in keep_zeros(folder / "run", **SHARDED).items()}
        for granularity in RUNS:
            trainer = prune_rows(folder / granularity, 4, granularity, **SHARDED)
            found |= {f"rows {granularity} {name}": tensor for name, tensor in describe(trainer).items()}
        checkpoint = str(folder / "unstructured/checkpoint-8")
        trainer = prune_rows(folder / "unstructured", 4, "unstructured", checkpoint, **SHARDED)
        found |= {f"resumed {name}": tensor for name, tensor in describe(trainer).items()}
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
    run_in_two(__file__, folder)
    return folder


def read_first(ranks, prefix, rank=0):
    """Return what the first process left under a prefix."""
    found = load_file(ranks / f"{rank}.safetensors").items()
    return {name.removeprefix(f"{prefix} "): tensor for name, tensor in found if name.startswith(f"{prefix} ")}


def read(ranks, prefix):
    """Return what both processes left under a prefix, and check that it is the same."""
    first, second = (read_first(ranks, prefix, rank) for rank in range(2))
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    return first


@pytest.mark.parametrize("granularity", ["unstructured", "structured"])
def test_two_processes_prune_what_one_does_on_both_batches(ranks, tmp_path, granularity):
    both, alone = read(ranks, granularity), gather_state(prune(tmp_path, 8, granularity=granularity))
    assert both.keys() == alone.keys()
    for name, tensor in alone.items():
        kind = name.split()[0]
        if kind == "keep":
            assert torch.equal(both[name], tensor), name
        elif kind != "weight":  # what is zero but for rounding differs: the gradient of the keys' biases
            largest = max(float(other.max()) for key, other in alone.items() if key.startswith(kind))
            torch.testing.assert_close(both[name], tensor, rtol=1e-3, atol=largest * 1e-5)


@pytest.mark.parametrize("granularity", RUNS)
def test_two_processes_with_the_rows_of_one_model_prune_what_one_does(ranks, tmp_path, granularity):
    both, alone = read_first(ranks, f"rows {granularity}"), describe(prune_rows(tmp_path, 8, granularity))
    assert both.keys() == alone.keys()
    masks = {name for name in alone if name.startswith("keep.")}
    assert [name for name in masks if not torch.equal(both[name], alone[name])] == []
    assert not any(alone[name].all() for name in masks)
    for name in alone.keys() - masks - {"weights"}:
        torch.testing.assert_close(both[name], alone[name], rtol=1e-2, atol=1e-6)


def test_a_sharded_run_is_saved_whole_and_resumed_on_two_processes(ranks):
    whole, resumed = (read_first(ranks, prefix) for prefix in ("rows unstructured", "resumed"))
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []


def test_the_state_of_a_sharded_run_is_that_of_whole_parameters(ranks):
    folder = ranks / "unstructured/checkpoint-8"
    pruner = Pruner(
        MoEBertForSequenceClassification.from_pretrained(folder),
        PlatonConfig(**RECIPE | RUNS["unstructured"][1]),
        STEPS,
    )
    pruner.load(folder, 8)  # which compares shapes and weights


@pytest.mark.parametrize("form", ["replicas", "shards"])
def test_zeros_stay_zero_in_two_processes(ranks, form):
    after, model = read(ranks, form), make_sparse()
    assert after.keys() == model.state_dict().keys()
    for name, parameter in find_prunable(model, PlatonConfig()).items():
        assert torch.equal(after[name] == 0, parameter == 0), name
        assert not torch.equal(after[name], parameter), name


@pytest.mark.parametrize("rank", [0, 1])
def test_processes_whose_masks_differ_all_stop(ranks, rank):
    assert "All processes must have the same mask, but at step" in (ranks / f"{rank}.txt").read_text(encoding="utf-8")


if __name__ == "__main__":
    be_one_of_two(Path(sys.argv[1]))
