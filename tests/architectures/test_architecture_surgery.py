"""Feed-forward networks are found by the row of the family, and can be narrowed and replaced."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_families import GATED, HIDDEN, LAYERS, UNITS, WIDTHS, make_model, run
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

from hf_moebert.architectures.families import ARCHITECTURES
from hf_moebert.architectures.surgery import find_feed_forwards, matrix_of, narrow


PLACES = {  # of the network, in the order of blocks
    ("bert", AutoModelForSequenceClassification): ["bert.encoder.layer.{}.output.dense"],
    ("llama", AutoModelForCausalLM): ["model.layers.{}.mlp"],
    ("gpt2", AutoModelForCausalLM): ["transformer.h.{}.mlp"],
    ("opt", AutoModelForCausalLM): ["model.decoder.layers.{}.fc2"],
    ("t5", AutoModelForSeq2SeqLM): [
        "encoder.block.{}.layer.1.DenseReluDense",
        "decoder.block.{}.layer.2.DenseReluDense",
    ],
}


def build(family):
    return make_model(family.split()[0], **GATED.get(family, {}))


class Network(nn.Module):
    """What a dense feed-forward network computes, written out."""

    def __init__(self, dense):
        super().__init__()
        self.gate, self.up, self.down = (dense.part(name) for name in ("gate", "up", "down"))
        self.activation = dense.part("activation")

    def forward(self, x):
        if self.gate is not None:
            return self.down(self.activation(self.gate(x)) * self.up(x))
        gate, *up = self.up(x).split(matrix_of(self.down).shape[1], dim=-1)
        return self.down(self.activation(gate) * up[0] if up else self.activation(gate))


@pytest.mark.parametrize(("family", "auto"), PLACES)
def test_networks_are_found_in_the_order_of_blocks(family, auto):
    dense = make_model(family, auto=auto)
    found = find_feed_forwards(dense)
    assert [n.place for n in found] == [p.format(block) for p in PLACES[family, auto] for block in range(LAYERS)]
    modules = dict(dense.named_modules())
    for network in found:
        assert network.num_units == UNITS
        assert (network.part("gate") is not None) == (family == "llama")
        for name, path in zip(network.paths.matrices, network.matrix_paths, strict=True):
            assert modules[path] is network.part(name)
            assert matrix_of(modules[path]).shape == ((HIDDEN, UNITS) if name == "down" else (UNITS, HIDDEN))


@pytest.mark.parametrize("family", [*ARCHITECTURES, "t5 gated"])
def test_every_matrix_of_a_block_but_attention_is_found(family):
    """The oracle is the width: no other matrix has it."""
    dense = build(family)
    width = WIDTHS[family.split()[0]]
    found = {path for network in find_feed_forwards(dense) for path in network.matrix_paths}
    linear = {name: m for name, m in dense.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    assert found == {name for name, m in linear.items() if {width, 2 * width} & set(m.weight.shape)}


@pytest.mark.parametrize("family", [*sorted({*ARCHITECTURES} - {"bloom"}), *GATED])  # bloom's adds the residual
def test_a_network_in_the_place_of_another_does_its_work(family):
    dense = build(family)
    wanted = run(dense)
    for network in find_feed_forwards(dense):
        network.replace_in(dense, Network(network))
    assert torch.equal(run(dense), wanted)
    assert find_feed_forwards(dense, missing_ok=True) == []
    with pytest.raises(ValueError, match="must be a plain Linear or Conv1D, got .*. Merge adapters"):
        find_feed_forwards(dense)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("family", [*ARCHITECTURES, *GATED])
def test_narrowing_keeps_the_first_units(family, device):
    """The oracle is the model whose other units have no way out."""
    dense, narrowed = build(family), build(family).to(device)
    for network, small in zip(find_feed_forwards(dense), find_feed_forwards(narrowed), strict=True):
        small.narrow(5)
        assert small.num_units == 5
        matrix_of(network.part("down")).detach()[:, 5:] = 0
    if device == "cpu":
        torch.testing.assert_close(run(narrowed), run(dense), atol=1e-4, rtol=0)
    if family == "llama":
        assert {layer.mlp.intermediate_size for layer in narrowed.layers} == {5}


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_narrowing_leaves_the_first_rows_and_columns(kind):
    linear = kind(5, 7) if kind is nn.Linear else kind(7, 5)
    weight, bias = matrix_of(linear).detach().clone(), linear.bias.detach().clone()
    narrow(linear, rows=3, columns=4)
    assert torch.equal(matrix_of(linear), weight[:3, :4])
    assert torch.equal(linear.bias, bias[:3])
    assert linear.weight.is_contiguous()
    assert linear(torch.zeros(2, 4)).shape == (2, 3)
    narrow(linear, rows=0)
    assert matrix_of(linear).shape == (0, 4)


def test_narrowing_in_blocks_leaves_the_first_rows_of_each():
    linear = nn.Linear(5, 6)
    weight, bias = linear.weight.detach().clone(), linear.bias.detach().clone()
    narrow(linear, rows=2, blocks=2)
    assert torch.equal(linear.weight, weight[[0, 1, 3, 4]])
    assert torch.equal(linear.bias, bias[[0, 1, 3, 4]])
    assert linear.out_features == 4


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it
def test_matrices_that_an_adapter_has_wrapped_are_refused():
    model = make_model("llama", auto=AutoModelForCausalLM)
    adapted = get_peft_model(model, LoraConfig(target_modules=["up_proj"])).get_base_model()
    with pytest.raises(
        ValueError, match=r"mlp.up_proj` of LlamaDecoderLayer must be a plain .*lora.*. Merge adapters"
    ):
        find_feed_forwards(adapted)
