"""Runs of the door on tiny models, as several tests make them."""

import itertools

import torch
from datasets import Dataset
from tiny_classifiers import WORDS
from transformers import AutoConfig, AutoTokenizer, BertForTokenClassification, TrainerCallback

from hf_moebert.compress.door import compress
from hf_moebert.compress.recipe_file import parse_recipe
from hf_moebert.measuring.comparison import TextColumns


COLUMNS = TextColumns(max_length=12)
SENTENCES = [" ".join(words) for words in itertools.product(WORDS, repeat=3)]  # 216 of them
STACK = [
    {"prune": {"keep_ratio": 0.5, "multiple_of": 1}},
    {"experts": {"num_experts": 2, "routing": "gate-sentence", "importance_examples": 40}},
    {"distil": {"steps": 4, "batch_size": 8}},
    {"optimize": {"precision": "float32"}},
]


class Stopped(Exception):
    """What a power failure would be."""


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Stopped


def recipe_of(stages, **target):
    return parse_recipe({"stages": stages, "target": {"max_drop": 1.0, "tokens": 8} | target})


def run(model, output, stages, data=None, **options):
    options = {"columns": COLUMNS, "rounds": 2, "training": {"use_cpu": True}} | options
    recipe = stages if not isinstance(stages, list) else recipe_of(stages)
    return compress(model, recipe, data=texts() if data is None else data, output_dir=output, **options)


def texts(labelled=True):
    rows = [
        {"text": text} | ({"label": ("negative", "positive")["good" in text]} if labelled else {})
        for text in SENTENCES
    ]
    return Dataset.from_list(rows)


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def save_tagger(folder, given):
    """Save a random tagger of the size of the classifier."""
    named = {"id2label": dict(enumerate(TAGS)), "label2id": {tag: index for index, tag in enumerate(TAGS)}}
    torch.manual_seed(0)
    tagger = BertForTokenClassification(AutoConfig.from_pretrained(given, **named))
    torch.nn.init.normal_(tagger.classifier.bias)  # a trained head
    tagger.save_pretrained(folder)
    AutoTokenizer.from_pretrained(given).save_pretrained(folder)


TAGS = ("O", "B-thing", "I-thing")
TAGGED = [{"tokens": text.split(), "tags": [TAGS[word == "film"] for word in text.split()]} for text in SENTENCES]
