"""What a model is made of, and which stages it can go through."""

import pytest
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
)

from hf_moebert.compress.inspecting import inspect_model


SIZES = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 30}


def test_parts_add_up():
    model = BertForSequenceClassification(BertConfig(**SIZES))
    found = inspect_model(model)
    assert sum(found["parts"].values()) == found["parameters"] == model.num_parameters()
    assert found["parts"]["embeddings"] == 30 * 8
    assert found["parts"]["feed-forward"] == 2 * (2 * 8 * 16 + 16 + 8)
    assert found["parts"]["attention and norms"] == 2 * (4 * (64 + 8) + 2 * 16)
    assert not any(found["stages"][stage] for stage in ("compress", "drop_layers", "prune", "experts"))


@pytest.mark.parametrize(
    ("model", "stage", "reason"),
    [
        (BertModel(BertConfig(**SIZES)), "compress", "must say by modules.json"),
        (AlbertForSequenceClassification(AlbertConfig(**SIZES, embedding_size=4)), "prune", "can be removed"),
    ],
)
def test_what_cannot_be_has_its_reason(model, stage, reason):
    assert reason in inspect_model(model)["stages"][stage]
