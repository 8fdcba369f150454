"""Tiny models of many families, without a single zero, and data that suit them."""

import torch
from datasets import Dataset
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

from hf_moebert import (
    MoEBertConfig,
    MoEBertForSequenceClassification,
)


VOCAB, END = 20, 19
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
BERT_SIZES = SIZES | {"vocab_size": VOCAB, "max_position_embeddings": 16}
EXPERTS = {"num_experts": 4, "expert_size": 8, "num_shared_neurons": 4}


def moebert(routing):
    return MoEBertForSequenceClassification(MoEBertConfig(**BERT_SIZES, **EXPERTS, routing=routing))


MODELS = {
    "bert": lambda: BertForSequenceClassification(BertConfig(**BERT_SIZES)),
    "roberta": lambda: RobertaForSequenceClassification(RobertaConfig(**BERT_SIZES)),
    "distilbert": lambda: DistilBertForSequenceClassification(
        DistilBertConfig(vocab_size=VOCAB, dim=16, n_layers=2, n_heads=4, hidden_dim=32)
    ),
    "deberta-v2": lambda: DebertaV2ForSequenceClassification(
        DebertaV2Config(**BERT_SIZES, relative_attention=True, pos_att_type=["c2p", "p2c"])
    ),
    "vit": lambda: ViTForImageClassification(ViTConfig(**SIZES, image_size=8, patch_size=4)),
    "gpt2": lambda: GPT2ForSequenceClassification(
        GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=4, pad_token_id=0, bos_token_id=1, eos_token_id=END)
    ),
    "llama": lambda: LlamaForSequenceClassification(
        LlamaConfig(**BERT_SIZES, num_key_value_heads=2, pad_token_id=0, eos_token_id=END)
    ),
    "t5": lambda: T5ForSequenceClassification(
        T5Config(
            vocab_size=VOCAB,
            d_model=16,
            d_kv=4,
            d_ff=32,
            num_layers=2,
            num_heads=4,
            eos_token_id=END,
            decoder_start_token_id=0,
        )
    ),
    "albert": lambda: AlbertForSequenceClassification(AlbertConfig(embedding_size=8, **BERT_SIZES)),
    "mixtral": lambda: MixtralForSequenceClassification(
        MixtralConfig(**BERT_SIZES, num_key_value_heads=2, num_local_experts=4, pad_token_id=0, eos_token_id=END)
    ),
    "hash": lambda: moebert("hash-random"),
    "gate": lambda: moebert("gate-token"),
}


def build(family):
    """A model without a single zero, so that every zero at the end was put there."""
    torch.manual_seed(0)
    model = MODELS[family]()
    model.accepts_loss_kwargs = False
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.masked_fill_(parameter == 0, 0.01)
    return model


def make_data(family, count=64):
    generator = torch.Generator().manual_seed(0)
    if family == "vit":
        images = torch.randn(count, 3, 8, 8, generator=generator)
        return [{"pixel_values": image, "labels": int(image.mean() > 0)} for image in images]
    ids = torch.randint(1, END, (count, 6), generator=generator)
    ids[:, -1] = END
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": (ids[:, 0] < 10).long().tolist()})


def count_zeros_of(parameters):
    return sum(int((parameter == 0).sum()) for parameter in parameters)
