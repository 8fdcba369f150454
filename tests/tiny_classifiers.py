"""Tiny fine-tuned classifiers in folders, for tests that load models as a user does."""

import json

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer


WORDS = ["good", "bad", "film", "not", "very", "a"]
EXAMPLES = [
    {"text": "a good film", "label": "positive"},
    {"text": "a bad film", "label": "negative"},
    {"text": "not good", "label": "negative"},
    {"text": "very good", "label": "positive"},
    {"text": "very bad", "label": "negative"},
    {"text": "not bad", "label": "positive"},
    {"text": "good", "label": "positive"},
    {"text": "bad bad film", "label": "negative"},
]


def save_classifier(folder, *, labels=("negative", "positive"), layers=1, seed=0, words=WORDS, **options):
    """Save a random BERT and its tokenizer as a checkpoint folder."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = BertTokenizer(vocab={token: index for index, token in enumerate([*special, *words])})
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
        initializer_range=1.0,  # so that predictions differ from example to example
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
        **options,
    )
    model = BertForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory):
    """A folder with the models `large` and `small`, and the labelled examples as `examples.jsonl`."""
    folder = tmp_path_factory.mktemp("tiny classifiers é")
    save_classifier(folder / "large", layers=2)
    save_classifier(folder / "small", seed=1)
    lines = "".join(json.dumps(example) + "\n" for example in EXAMPLES)
    (folder / "examples.jsonl").write_text(lines, encoding="utf-8")
    return folder
