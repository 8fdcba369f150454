"""What a dry run foretells: the sizes that the stages leave, and what takes time."""

import pytest
import torch
from transformers import AlbertConfig, AlbertForSequenceClassification, BertConfig, BertForSequenceClassification

from hf_moebert.compress.predicting import predict
from hf_moebert.compress.recipe_file import parse_recipe
from hf_moebert.compress.searching import STRUCTURES


SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
ALL = 2 * (4 * (16 * 16 + 16) + 2 * 16 * 32 + 32 + 16 + 2 * 32)  # weights of two layers, with two normalisations each


@pytest.fixture(scope="module")
def dense():
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(vocab_size=30, **SIZES)).eval()


def foretell(dense, stages):
    recipe = parse_recipe({"stages": stages, "target": {"tokens": 8}})
    return predict(dense, recipe, examples=40)


@pytest.mark.parametrize(
    ("stages", "gone"),
    [
        ([{"optimize": {"precision": "float32"}}], 0),
        ([{"drop_layers": {"keep": 0.5}}], ALL // 2),
        # half of the neurons and one of two heads of every layer, with the biases of their rows
        ([{"prune": {"keep_ratio": 0.5, "multiple_of": 1}}], 2 * (16 * 33 + 8 * (4 * 16 + 3))),
        ([{"prune": {"method": "platon", "keep_ratio": 0.5, "multiple_of": 1}}, "distil"], 2 * (16 * 33 + 8 * 67)),
    ],
)
def test_the_parameters_are_those_that_the_stages_leave(dense, stages, gone):
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    (found,) = foretell(dense, stages)
    assert found.parameters == dense.num_parameters() - gone
    assert (found.training_seconds > 0) == ("distil" in stages)
    for name, tensor in dense.state_dict().items():
        torch.testing.assert_close(tensor, before[name])


def test_a_search_leaves_out_what_a_family_cannot_have():
    torch.manual_seed(0)
    albert = AlbertForSequenceClassification(AlbertConfig(vocab_size=30, embedding_size=8, **SIZES)).eval()
    names = [one.name for one in foretell(albert, ["search", "distil"])]
    assert "as it is" in names
    assert not any("pruned" in name for name in names)
    with pytest.raises(ValueError, match="neurons or heads can be removed"):
        foretell(albert, [{"prune": {"keep_ratio": 0.5}}])


def test_layers_too_narrow_for_experts_stay_dense(dense):
    stages = [{"prune": {"keep_ratio": 0.05, "multiple_of": 1}}, {"experts": {"num_experts": 4}}]
    (found,) = foretell(dense, stages)
    assert found.parameters < dense.num_parameters()


def test_of_a_search_every_structure_is_foretold(dense):
    found = foretell(dense, ["search", "distil"])
    assert [one.name for one in found] == list(STRUCTURES)
    assert found[0].training_seconds == 0  # as it is
    pruned = {one.name: one.parameters for one in found}
    assert pruned["pruned to 30 %"] < pruned["pruned to 70 %"] < pruned["as it is"]
