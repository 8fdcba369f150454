"""Tiny models with most of their weights zero, for tests of what pruning is worth."""

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
)

from hf_moebert import MoEBertConfig, MoEBertForSequenceClassification


SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 16,
}


def prune(model, kept=0.1):
    """Zero all but a share of every matrix."""
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight[torch.rand_like(weight) > kept] = 0
    return model.eval()


def make_bert():
    torch.manual_seed(0)
    return prune(BertForSequenceClassification(BertConfig(**SIZES)))


def make_moebert():
    torch.manual_seed(0)
    config = MoEBertConfig(**SIZES, num_experts=2, expert_size=64, num_shared_neurons=16)
    return prune(MoEBertForSequenceClassification(config))


def make_gpt2():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=64, n_embd=64, n_layer=1, n_head=4, n_positions=16, bos_token_id=0, eos_token_id=0, pad_token_id=0
    )
    return prune(GPT2LMHeadModel(config))


def make_mixtral():
    torch.manual_seed(0)
    config = MixtralConfig(
        **SIZES, num_key_value_heads=2, num_local_experts=4, bos_token_id=0, eos_token_id=0, pad_token_id=0
    )
    return prune(MixtralForCausalLM(config))
