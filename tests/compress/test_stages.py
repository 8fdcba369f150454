"""One `shrink` for all methods: what it dispatches to, and what it refuses."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification

from hf_moebert import shrink
from hf_moebert.methods import mixture_of_masks


SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}


def make_dense():
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(vocab_size=20, max_position_embeddings=16, **SIZES)).eval()


def assert_same_logits(one, other):
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        torch.testing.assert_close(one(ids).logits, other(ids).logits)


@pytest.mark.parametrize(("multiple_of", "width"), [(1, 22), (8, 24)])
def test_pruned_units_are_removed(multiple_of, width):
    model = make_dense()
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight[:, :10] = 0
    small = shrink(model, multiple_of=multiple_of)
    assert [layer["neurons"] for layer in small.config.widths] == [width, 32]
    assert_same_logits(small, model)


def test_closed_masks_are_removed():
    model = mixture_of_masks.from_dense(make_dense(), num_experts=1, group_size=8).fix_masks(0.5)
    small = shrink(model)
    assert small.config.mask_stage == "compact"
    assert small.num_parameters() < make_dense().num_parameters()
    assert_same_logits(small, model)


def test_a_multiple_does_not_apply_to_masks():
    model = mixture_of_masks.from_dense(make_dense(), num_experts=1).fix_masks(0.5)
    with pytest.raises(ValueError, match=r"`multiple_of` must be 1 for a model with masks, got 8. .*group_size=8"):
        shrink(model, multiple_of=8)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # asked for by peft
def test_models_that_cannot_be_shrunk_are_refused():
    masked = mixture_of_masks.from_dense(make_dense())
    with pytest.raises(ValueError, match="`model` must have fixed masks, but is learned"):
        shrink(masked)
    adapted = get_peft_model(masked.fix_masks(0.5), LoraConfig(target_modules=["query"]))
    with pytest.raises(ValueError, match="but is dense, or wrapped by adapters. Merge adapters"):
        shrink(adapted)
    with pytest.raises(ValueError, match="`model` must be of a known family"):
        shrink(torch.nn.Linear(2, 2))
