"""Tiny single-task models on one trunk, one of every kind, and the folder of their merger."""

import torch
from transformers import (
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    BertTokenizer,
)

from hf_moebert import BertCrfForTokenClassification
from hf_moebert.methods.multitask.modeling_multitask import MultiTaskBertModel


SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = ["good", "bad", "film", "book", "by", "ann", "##a", "lee", "in", "rome", "what", "is", "?", ".", "not", "a"]
TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
KINDS = {  # class, frozen layers, labels, other fields of the configuration
    "sentiment": (BertForSequenceClassification, 1, ["negative", "positive"], {}),
    "topics": (BertForSequenceClassification, 2, ["a", "b", "c"], {"problem_type": "multi_label_classification"}),
    "stars": (BertForSequenceClassification, 0, ["stars"], {"problem_type": "regression"}),
    "names": (BertForTokenClassification, 2, TAGS, {}),
    "slots": (BertCrfForTokenClassification, 1, TAGS, {}),
    "answers": (BertForQuestionAnswering, 1, ["start", "end"], {}),
}


def make_tokenizer():
    vocab = {word: index for index, word in enumerate(SPECIAL + WORDS)}
    return BertTokenizer(vocab=vocab, model_max_length=16)


def make_task(name, seed=0, trunk_seed=0):
    """Return a single-task model; those of one `trunk_seed` share their first two layers."""
    cls, frozen, labels, options = KINDS[name]
    config = cls.config_class(
        vocab_size=len(SPECIAL + WORDS),
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        initializer_range=0.7,  # so that answers differ from input to input
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
        **options,
    )
    torch.manual_seed(trunk_seed)
    shared = BertModel(config)
    torch.manual_seed(seed + 100 * list(KINDS).index(name))
    model = cls(config)
    model.base_model.embeddings.load_state_dict(shared.embeddings.state_dict())
    for own, theirs in zip(model.base_model.encoder.layer[:2], shared.encoder.layer[:2], strict=True):
        own.load_state_dict(theirs.state_dict())
    model.config.frozen_layers = frozen
    return model.eval()


def make_tasks():
    return {name: make_task(name) for name in KINDS}


def save_merged(folder, names=tuple(KINDS)):
    """Save the merger of some tasks, and the tokenizer."""
    MultiTaskBertModel.from_tasks({name: make_task(name) for name in names}).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder
