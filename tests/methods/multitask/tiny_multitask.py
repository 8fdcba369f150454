"""Tiny single-task models that share their first layers, batches, and comparisons."""

import copy

import torch
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
)

from hf_moebert.methods.masked_crf import BertCrfForTokenClassification


VOCAB, LIMIT = 61, 24
TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
# Frozen layers, own layers, and head of each task; two names are prefixes of a third
TASKS = {
    "qq": (2, 1, "classes"),
    "qqp": (0, 2, "classes"),
    "qqp-2_b": (3, 1, "classes"),
    "score": (2, 2, "score"),
    "topics": (1, 1, "topics"),
    "ner": (1, 2, "tags"),
    "slots": (2, 1, "crf"),
    "answers": (3, 1, "answers"),
}
NAMES = {"id2label": dict(enumerate(TAGS)), "label2id": {tag: index for index, tag in enumerate(TAGS)}}
HEADS = {
    "classes": (BertForSequenceClassification, {"num_labels": 3}),
    "score": (BertForSequenceClassification, {"num_labels": 1, "problem_type": "regression"}),
    "topics": (BertForSequenceClassification, {"num_labels": 4, "problem_type": "multi_label_classification"}),
    "tags": (BertForTokenClassification, NAMES),
    "crf": (BertForTokenClassification, NAMES),
    "answers": (BertForQuestionAnswering, {}),
}


def make_encoder(seed=0, **options):
    """Return a random encoder of four layers whose states differ from token to token."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48}
    config = BertConfig(vocab_size=VOCAB, max_position_embeddings=LIMIT, initializer_range=0.3, **{**sizes, **options})
    encoder = BertModel(config)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    return encoder.eval()


def make_task(encoder, frozen, own, kind, *, seed=0):
    """Return a single-task model of `frozen + own` layers, of which the first `frozen` are those of the encoder."""
    torch.manual_seed(seed)
    head, options = HEADS[kind]
    config = copy.deepcopy(encoder.config)
    config.num_hidden_layers, config.frozen_layers = frozen + own, frozen
    for name, value in options.items():
        setattr(config, name, value)
    model = head(config).eval()
    shared = ("embeddings.", *(f"encoder.layer.{i}." for i in range(frozen)))
    model.bert.load_state_dict({k: v for k, v in encoder.state_dict().items() if k.startswith(shared)}, strict=False)
    if kind != "crf":
        return model
    tagger = BertCrfForTokenClassification.from_dense(model)
    tagger.config.frozen_layers = frozen
    for parameter in tagger.crf.parameters():
        torch.nn.init.normal_(parameter)
    return tagger


def make_tasks(names=tuple(TASKS), encoder=None):
    """Return single-task models by name."""
    encoder = encoder or make_encoder()
    return {name: make_task(encoder, *TASKS[name], seed=i) for i, name in enumerate(names)}


def make_batch(rows=3, length=9, *, padded=True, seed=0):
    """Return ids, mask and token types."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCAB, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        for row in range(rows):
            mask[row, length - 2 * row :] = 0
    types = torch.randint(0, 2, (rows, length), generator=generator)
    return {"input_ids": ids * mask, "attention_mask": mask, "token_type_ids": types * mask, "word_mask": mask}


def make_labels(batch, seed=0):
    """Return labels of every task, as its single-task model takes them."""
    generator = torch.Generator().manual_seed(seed)
    rows, length = batch["input_ids"].shape
    tags = torch.tensor([0, 1, 2, 2, 0, 3, 4, 0, 1, 2])[:length].repeat(rows, 1)  # legal
    tags = tags.masked_fill(batch["attention_mask"] == 0, -100)
    classes = torch.randint(0, 3, (rows,), generator=generator)
    return {
        "qq": {"labels": classes},
        "qqp": {"labels": classes.flip(0)},
        "qqp-2_b": {"labels": classes},
        "score": {"labels": torch.rand(rows, generator=generator)},
        "topics": {"labels": torch.randint(0, 2, (rows, 4), generator=generator).float()},
        "ner": {"labels": tags},
        "slots": {"labels": tags},
        "answers": {"start_positions": classes, "end_positions": classes + 1},
    }


def assert_same(output, expected):
    """Check that both outputs have the same fields, equal bit for bit."""
    assert list(output) == list(expected)
    for key, value in expected.items():
        assert torch.equal(output[key], value), key


def assert_same_models(model, expected):
    """Check that both models are of one class, with equal configuration and weights."""
    assert type(model) is type(expected)
    ours, theirs = model.config.to_dict(), expected.config.to_dict()
    assert {k: v for k, v in ours.items() if k != "dtype"} == {k: v for k, v in theirs.items() if k != "dtype"}
    assert list(model.state_dict()) == list(expected.state_dict())
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
