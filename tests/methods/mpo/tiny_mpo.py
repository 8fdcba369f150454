"""Tiny random models of every architecture that matrix product operators are tested on."""

import copy

import torch
from transformers import (
    AlbertConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertConfig,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    RobertaConfig,
    T5Config,
)


WORDS = {"vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, **WORDS}
T5_SIZES = {"d_model": 24, "d_kv": 12, "d_ff": 48, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
MODELS = {
    "bert": (AutoModelForSequenceClassification, BertConfig(**SIZES)),
    "bert-mlm": (AutoModelForMaskedLM, BertConfig(**SIZES)),
    "albert": (AutoModelForMaskedLM, AlbertConfig(**SIZES, embedding_size=16)),
    "distilbert": (
        AutoModelForSequenceClassification,
        DistilBertConfig(dim=24, n_layers=2, n_heads=2, hidden_dim=48, **WORDS),
    ),
    "roberta": (AutoModelForMaskedLM, RobertaConfig(**{**SIZES, "pad_token_id": 1})),
    "t5": (AutoModelForSeq2SeqLM, T5Config(**T5_SIZES, **WORDS)),
    "t5-gated": (
        AutoModelForSeq2SeqLM,
        T5Config(**T5_SIZES, **WORDS, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    ),
    "gpt2": (AutoModelForCausalLM, GPT2Config(n_embd=24, n_layer=2, n_head=2, n_positions=32, **WORDS)),
    "llama": (AutoModelForCausalLM, LlamaConfig(**SIZES, num_key_value_heads=1)),
    "llama-tied": (AutoModelForCausalLM, LlamaConfig(**SIZES, num_key_value_heads=1, tie_word_embeddings=True)),
}
IDS = torch.randint(3, 99, (2, 7), generator=torch.Generator().manual_seed(0))


def make(name, **changes):
    """Make the same random model every time, in evaluation."""
    auto, config = MODELS[name]
    torch.manual_seed(0)
    config = copy.deepcopy(config)
    for key, value in changes.items():
        setattr(config, key, value)
    return auto.from_config(config).eval()


def arguments(name, ids=IDS, *, labels=False):
    """Return what the model is called with."""
    given = {"input_ids": ids}
    if name.startswith("t5"):
        given["decoder_input_ids"] = ids
    if labels:
        given["labels"] = torch.arange(len(ids)) % 2 if name in ("bert", "distilbert") else ids
    return given


@torch.no_grad()
def logits(name, model, ids=IDS):
    """Return the logits of a model."""
    return model(**arguments(name, ids)).logits
