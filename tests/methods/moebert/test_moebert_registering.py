"""Mixtures of a family that is not shipped, described by a row: here, and in other processes."""

import json
from pathlib import Path

import new_process
import pytest
import torch
from test_moebert_families import convert
from tiny_families import SIZES, TEXT, make_inputs
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification

from hf_moebert import register_architecture, registration
from hf_moebert.architectures.families import ARCHITECTURES
from hf_moebert.architectures.paths import Architecture, AttentionPaths, FeedForwardPaths, Stack
from hf_moebert.methods.moebert import from_dense


ATTENTION = AttentionPaths(
    readers=("attention.self.query", "attention.self.key", "attention.self.value"),
    writer="attention.output.dense",
    module="attention.self",
    head_size="attention_head_size",
)
NETWORK = FeedForwardPaths(up="intermediate.dense", activation="intermediate.intermediate_act_fn", down="output.dense")
ROFORMER = Architecture(stacks=(Stack("encoder.layer", (ATTENTION,), (NETWORK,)),), units=("neurons", "heads"))
FOLDERS = (Path(__file__).parent, Path(__file__).parents[2])  # of what a new process imports
HEADS = (AutoModel, AutoModelForSequenceClassification, AutoModelForMaskedLM)


def build(auto=AutoModel):
    torch.manual_seed(0)
    config = AutoConfig.for_model("roformer", **SIZES | TEXT, embedding_size=16, initializer_range=0.3)
    return auto.from_config(config).eval()


@pytest.fixture
def registered():
    """The row of the family, forgotten after the test."""
    register_architecture("roformer", ROFORMER, build())
    yield
    registration.forget_architecture("roformer")


@torch.no_grad()
@pytest.mark.parametrize("auto", HEADS)
def test_a_registered_family_becomes_a_mixture(registered, tmp_path, auto):
    dense = build(auto)
    whole, _ = convert(dense, num_experts=1, routing="gate-token")
    inputs = make_inputs(dense) | {"attention_mask": torch.ones(2, 7, dtype=torch.long)}
    torch.testing.assert_close(whole(**inputs)[0], dense(**inputs)[0], atol=1e-6, rtol=1e-6)
    student, _ = convert(dense, num_experts=3)
    student.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))  # without its row, the code could not build it
    loaded = auto.from_pretrained(tmp_path)
    assert type(loaded) is type(student)
    assert torch.equal(loaded(**inputs)[0], student(**inputs)[0])


def test_a_family_without_a_row_is_refused():
    assert "roformer" not in ARCHITECTURES
    with pytest.raises(
        ValueError, match="got 'roformer', .*, or describe another family by `hf_moebert.register_arch"
    ):
        from_dense(build(), torch.rand(2, 24))


LOAD = """
import json, sys, torch, transformers, hf_moebert
try:
    transformers.AutoModel.from_pretrained(sys.argv[1])
except Exception as error:
    print()  # the question of transformers whether to trust is on this line
    print(json.dumps(str(error)))
sys.path[:0] = json.loads(sys.argv[3])
from test_moebert_registering import ROFORMER
hf_moebert.register_architecture("roformer", ROFORMER)
model = transformers.AutoModel.from_pretrained(sys.argv[1])
print(model(torch.tensor(json.loads(sys.argv[2])))[0].tolist())
"""


@pytest.mark.process
@torch.no_grad()
def test_another_process_must_register_the_row_first(registered, tmp_path):
    student, _ = convert(build())
    student.save_pretrained(tmp_path)
    ids = make_inputs(student)["input_ids"]
    folders = [str(path) for path in FOLDERS]
    run = new_process.run(LOAD, tmp_path, json.dumps(ids.tolist()), json.dumps(folders))
    refusal, answer = run.stdout.splitlines()[-2:]
    assert "`pip install hf_moebert`, then `hf_moebert.register_architecture('roformer', ...)`" in json.loads(refusal)
    torch.testing.assert_close(torch.tensor(json.loads(answer)), student(ids)[0], atol=1e-5, rtol=1e-5)
