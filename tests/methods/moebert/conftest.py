"""A tiny fine-tuned BERT, a student made from it, and batches with padding."""

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from hf_moebert import MoEBertForSequenceClassification


SIZES = {"num_experts": 4, "expert_size": 16, "num_shared_neurons": 8}


@pytest.fixture
def dense_config():
    return BertConfig(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=32,
        num_labels=3,
        id2label={0: "bad", 1: "so so", 2: "good"},
        label2id={"bad": 0, "so so": 1, "good": 2},
    )


@pytest.fixture
def dense(dense_config):
    torch.manual_seed(0)
    return livelier(BertForSequenceClassification(dense_config)).eval()


@pytest.fixture
def importance():
    return torch.rand(3, 64, generator=torch.Generator().manual_seed(1))  # (layers, intermediate)


@pytest.fixture
def student(dense, importance):
    return MoEBertForSequenceClassification.from_dense(dense, importance, **SIZES)


@pytest.fixture
def batch():
    """Four rows, the second and the last padded."""
    ids = torch.randint(1, 100, (4, 11), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    mask[3, 9:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": torch.tensor([0, 2, 1, 1])}


def livelier(model):
    """Spread the weights of a fresh model, so that different routes give visibly different outputs."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "LayerNorm" not in name:
                parameter.mul_(8)
    return model
