"""Feed-forward networks are found by their structure, whatever the architecture."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_masks import HIDDEN, KINDS, LAYERS, UNITS, make_dense
from torch import nn
from transformers import BertConfig, BertModel, MixtralConfig, MixtralForCausalLM
from transformers.pytorch_utils import Conv1D

from hf_moebert.methods.mixture_of_masks.modeling_feed_forward import find_feed_forwards, matrix_of, resize


PLACES = {
    "gpt2": ["transformer.h.{}.mlp"],
    "bert": ["bert.encoder.layer.{}.output.dense"],
    "t5": ["encoder.block.{}.layer.1.DenseReluDense", "decoder.block.{}.layer.2.DenseReluDense"],
}
PLACES["t5-gated"] = PLACES["t5"]


@pytest.mark.parametrize("kind", KINDS)
def test_networks_are_found_in_the_order_of_blocks(kind):
    dense = make_dense(kind)
    found = find_feed_forwards(dense)
    patterns = PLACES.get(kind, ["model.layers.{}.mlp"])
    assert [network.place for network in found] == [p.format(block) for p in patterns for block in range(LAYERS)]
    modules = dict(dense.named_modules())
    for network in found:
        assert network.num_units == UNITS
        assert (network.part("gate") is not None) == (kind not in ("gpt2", "t5", "bert"))
        for name, path in zip(network.layout.matrices, network.matrix_paths, strict=True):
            assert modules[path] is network.part(name)
            assert matrix_of(modules[path]).shape == ((HIDDEN, UNITS) if name == "down" else (UNITS, HIDDEN))


@pytest.mark.parametrize("kind", KINDS)
def test_every_matrix_of_a_block_but_attention_is_found(kind):
    """The oracle is the width: no other matrix has it."""
    dense = make_dense(kind)
    found = {path for network in find_feed_forwards(dense) for path in network.matrix_paths}
    linear = {name: m for name, m in dense.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    assert found == {name for name, module in linear.items() if UNITS in module.weight.shape}


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_resizing_leaves_the_first_rows_and_columns(kind):
    linear = kind(5, 7)
    weight, bias = matrix_of(linear).detach().clone(), linear.bias.detach().clone()
    resize(linear, rows=3, columns=4)
    assert torch.equal(matrix_of(linear), weight[:3, :4])
    assert torch.equal(linear.bias, bias[:3])
    assert linear.weight.is_contiguous()
    assert linear(torch.zeros(2, 4)).shape == (2, 3)


def test_models_without_a_known_network_are_refused():
    sizes = {"hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 32, "num_hidden_layers": 1}
    mixtral = MixtralForCausalLM(MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=2, vocab_size=20))
    with pytest.raises(ValueError, match="must have feed-forward networks of a known structure, MixtralForCausalLM"):
        find_feed_forwards(mixtral)
    assert find_feed_forwards(mixtral, may_lack=True) == []
    assert len(find_feed_forwards(BertModel(BertConfig(**sizes, vocab_size=20)))) == 1


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it
def test_matrices_that_an_adapter_has_wrapped_are_refused():
    adapted = get_peft_model(make_dense("llama"), LoraConfig(target_modules=["up_proj"])).get_base_model()
    with pytest.raises(ValueError, match=r"mlp.up_proj` must be a plain linear module, got Linear. Merge\s+adapters"):
        find_feed_forwards(adapted)
