"""Two processes on one machine; run as a script, this file is one of them."""

import sys
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from tiny_families import make_model
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
)
from two_processes import leave, read_both, run_in_two

from hf_moebert import measure_importance
from hf_moebert.methods.moebert import from_dense


LENGTHS = (7, 1)  # of data sets that two processes cannot share evenly
pytestmark = pytest.mark.process
RUNS = {
    "hash-random": {"routing": "hash-random"},
    "gate-token": {"routing": "gate-token"},
    "gate-sentence": {"routing": "gate-sentence", "router_aux_loss_coef": 0.1, "gate_scaling": "probability"},
    # Of other families, whose networks are gated, or whose attention knows distances
    "modernbert": {"routing": "gate-token"},
    "deberta-v2": {"routing": "gate-token", "router_aux_loss_coef": 0.1},
}


def make_dense(run="bert"):
    if run in ("modernbert", "deberta-v2"):
        return make_model(run, AutoModelForSequenceClassification, num_labels=3, vocab_size=100, intermediate_size=64)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(
        BertConfig(vocab_size=100, num_labels=3, initializer_range=0.3, **sizes, **dropout)
    )


def make_student(run):
    """A student whose last two experts get no token: no table names them, or at first no gate chooses them."""
    dense = make_dense(run)
    importance = torch.rand(dense.config.num_hidden_layers, 64, generator=torch.Generator().manual_seed(1))
    sizes = {"num_experts": 4, "expert_size": 16, "num_shared_neurons": 8}
    model = from_dense(dense, importance, **sizes, **RUNS[run])
    with torch.no_grad():
        if run == "hash-random":
            model.bert.router.table.remainder_(2)
        else:
            for network in model.base_model.networks().values():
                network.gate.weight[2:] = network.gate.weight[:1]  # ties go to the lower index
    return model.train()


def make_examples(count):
    generator = torch.Generator().manual_seed(5)
    return [
        {"input_ids": torch.randint(1, 100, (6,), generator=generator), "labels": torch.tensor(i % 3)}
        for i in range(count)
    ]


def collate(examples):
    return {name: torch.stack([example[name] for example in examples]) for name in examples[0]}


def train(model, batch):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()


def be_one_of_two(folder):
    found = {}
    for length in LENGTHS:
        found[f"importance {length}"] = measure_importance(make_dense().double(), make_examples(length), batch_size=2)
    state = PartialState()
    assert state.num_processes == 2  # the measurement came first, and let the processes meet
    for run in RUNS:
        model = make_student(run)
        mine = collate(make_examples(8)[state.process_index :: 2])
        train(DistributedDataParallel(model), mine)
        found |= {f"{run} {name}": tensor for name, tensor in model.state_dict().items()}
    options = {"use_cpu": True, "report_to": "none", "save_strategy": "no", "ddp_find_unused_parameters": False}
    args = TrainingArguments(str(folder), per_device_train_batch_size=2, max_steps=3, disable_tqdm=True, **options)
    trainer = Trainer(make_student("hash-random"), args, train_dataset=make_examples(9))
    assert args.world_size == 2
    trainer.train()
    found |= {f"Trainer {name}": tensor for name, tensor in trainer.model.state_dict().items()}
    leave(found, folder)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Run two processes, and return what each ended with."""
    folder = tmp_path_factory.mktemp("ranks")
    run_in_two(__file__, folder)
    return read_both(folder)


@pytest.mark.parametrize("length", LENGTHS)
def test_two_processes_measure_the_importance_that_one_does(ranks, length):
    alone = measure_importance(make_dense().double(), make_examples(length), batch_size=2)
    for rank in ranks:
        torch.testing.assert_close(rank[f"importance {length}"], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("run", [*RUNS, "Trainer"])
def test_two_processes_end_with_one_model(ranks, run):
    first, second = ({name: rank[name] for name in rank if name.startswith(run)} for rank in ranks)
    assert len(first) >= 20
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.mark.parametrize("run", ["hash-random", "gate-token", "modernbert"])
def test_two_processes_train_what_one_does_on_both_batches(ranks, run):
    model, before = make_student(run), make_student(run).state_dict()
    train(model, collate(make_examples(8)))
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(ranks[0][f"{run} {name}"], tensor, atol=1e-5, rtol=1e-4)
        if "experts" in name and run == "hash-random":  # those without a token stand still
            assert torch.equal(tensor[2:], before[name][2:])
            assert not torch.equal(tensor[:2], before[name][:2])


if __name__ == "__main__":
    be_one_of_two(Path(sys.argv[1]))
