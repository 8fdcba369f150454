"""A model in training mode without dropout computes what it computes in evaluation mode."""

import pytest
import torch
from transformers import AutoConfig, AutoModel

from hf_moebert.training.dropout import without_dropout


SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 30,
}
RATES = {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("bert", SIZES | RATES),
        ("roberta", SIZES | RATES),
        ("mpnet", SIZES | RATES),
        ("deberta-v2", SIZES | RATES),
        ("distilbert", {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "vocab_size": 30, "dropout": 0.5}),
        ("modernbert", SIZES | {"vocab_size": 30, "pad_token_id": 0, "mlp_dropout": 0.5, "attention_dropout": 0.5}),
    ],
)
def test_training_without_dropout_is_evaluation(family, fields, attention):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **fields)
    if attention == "sdpa" and family in ("deberta-v2", "mpnet"):
        attention = "eager"  # their own attention alone
    config._attn_implementation = attention
    model = AutoModel.from_config(config, attn_implementation=attention)
    ids = torch.arange(1, 21).view(2, 10)
    wanted = model.eval()(ids)[0]
    model.train()
    assert not torch.allclose(model(ids)[0], wanted, atol=1e-4)
    with without_dropout(model):
        torch.testing.assert_close(model(ids)[0], wanted, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(model(ids)[0], wanted, atol=1e-4)  # as before
