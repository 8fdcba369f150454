"""Tiny models with a tokenizer, for exports that several tests share."""

import torch
from transformers import BertConfig, BertTokenizer

from hf_moebert.inference.linears import unsupported_reason


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "good", "film", "bad"]
TEXTS = ["a good film", "bad", "a bad film a good film"]
PRECISIONS = ("float32", "int8") if unsupported_reason("int8", True) is None else ("float32",)
SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}


def make(cls, **fields):
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(WORDS), max_position_embeddings=32, initializer_range=0.2, **SIZES, **fields)
    return cls(config)


def make_tokenizer():
    return BertTokenizer(vocab={word: index for index, word in enumerate(WORDS)})
