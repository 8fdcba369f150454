"""Answers token by token, and their usual scores: tags of words, answers to questions, the next token."""

from collections.abc import Sequence
from functools import cache

import numpy as np
from datasets import Dataset
from transformers import DataCollatorForTokenClassification, DataCollatorWithPadding

from hf_moebert.data import encode_text, encode_tokens
from hf_moebert.data.questions import encode_questions

from .answers import Answers, Asked, TextColumns
from .metrics.seqeval.seqeval import (
    FOUND,
    PREFIXES,
    count_illegal,
    count_spans,
    micro_f1,
    micro_precision,
    micro_recall,
)
from .metrics.squad.squad import best_over, exact_match, token_f1
from .predictions import predict_answers, predict_next_tokens, predict_tags
from .scores import Score


OUTSIDE = "O"


def _of(kind: str, score: Score) -> Score:
    """Score one way of reading the tags."""
    return lambda predictions, references: score(predictions[kind], references[kind])


# Of predictions and references with one field for each way of reading, `(sentences,)`
TAG_SCORES: dict[str, dict[str, Score]] = {
    "f1": {"f1": _of("lenient", micro_f1)},
    "strict_f1": {"strict f1": _of("strict", micro_f1)},
    "precision": {"precision": _of("lenient", micro_precision)},
    "recall": {"recall": _of("lenient", micro_recall)},
    "illegal": {"illegal segments": lambda predictions, references: float(predictions["illegal"].sum())},
}
NEED_SCHEME = ("strict_f1", "illegal")
USUAL_TAG_SCORES = ("f1", "strict_f1", "illegal")
TAG_FOUND = np.dtype([("lenient", FOUND), ("strict", FOUND), ("illegal", np.int64)])
TAG_TRUTH = np.dtype([("lenient", np.int64), ("strict", np.int64)])


def answer_by_tags(asked: Asked) -> Answers:
    """Compare the entities that are found, by sentences; words that were cut off count as no entity."""
    config, dataset = asked.config, asked.dataset
    names = [config.id2label[index] for index in range(config.num_labels)]
    tokens, tags = tag_columns(asked.columns, dataset)
    scheme = find_scheme(names, getattr(config, "tag_scheme", "auto"))
    predicted, wanted = {}, [[names[tag] if isinstance(tag, int) else tag for tag in row] for row in dataset[tags]]
    for name, entry in asked.loaded.items():
        order = asked.label_order(name)
        encoded = encode_tokens(
            dataset,
            entry.tokenizer,
            tokens_column=tokens,
            tags_column=tags,
            tag_names=names,
            max_length=asked.columns.max_length,
        )
        collate = DataCollatorForTokenClassification(entry.tokenizer)
        found = predict_tags(entry.model, encoded, data_collator=collate, batch_size=asked.batch_size)
        theirs = {column: names[index] for index, column in enumerate(order)}
        predicted[name] = [
            [theirs[tag] for tag in row] + [OUTSIDE] * (len(gold) - len(row))
            for row, gold in zip(found, wanted, strict=True)
        ]
    predictions, references = {}, np.zeros(len(dataset), TAG_TRUTH)
    for name, rows in predicted.items():
        counts = np.zeros(len(dataset), TAG_FOUND)
        counts["lenient"], references["lenient"] = count_spans(rows, wanted)
        if scheme is not None:
            counts["strict"], references["strict"] = count_spans(rows, wanted, True, scheme=scheme)
            counts["illegal"] = [count_illegal([row], scheme) for row in rows]
        predictions[name] = counts
    table = {name: scores for name, scores in TAG_SCORES.items() if scheme is not None or name not in NEED_SCHEME}
    return asked.answer(predictions, references, table, [name for name in USUAL_TAG_SCORES if name in table])


def find_scheme(names: Sequence[str], told: str = "auto") -> str | None:
    """Return the scheme that a model was told, or that of the prefixes of all its tags; None for others.

    Of schemes with the same prefixes it is the usual one: IOB2 for B and I.
    """
    prefixes = {name.partition("-")[0] for name in names if "-" in name}
    read = next((scheme for scheme, letters in PREFIXES.items() if set(letters) == prefixes), None)
    return read if told == "auto" else told


def tag_columns(columns: TextColumns, dataset: Dataset) -> tuple[str, str]:
    """Return the columns of words and tags: "tokens" and "tags" where those of a text's defaults are not there."""
    usual = TextColumns()
    tokens, tags = columns.text_column, columns.label_column
    return (
        "tokens" if tokens == usual.text_column and tokens not in dataset.column_names else tokens,
        "tags" if tags == usual.label_column and tags not in dataset.column_names else tags,
    )


def answer_by_spans(asked: Asked) -> Answers:
    """Compare the answers to questions with all that are right, `(questions, 2)`: exact match and F1, in [0, 1]."""
    exact, f1 = (
        cache(lambda text, golds, part=part: best_over(part, text, golds)) for part in (exact_match, token_f1)
    )
    predictions = {}
    golds = [tuple(answers["text"]) for answers in asked.dataset["answers"]]
    for name, entry in asked.loaded.items():
        encoded = encode_questions(asked.dataset, entry.tokenizer, max_length=asked.columns.max_length)
        collate = DataCollatorWithPadding(entry.tokenizer)
        texts = predict_answers(entry.model, encoded, data_collator=collate, batch_size=asked.batch_size)
        predictions[name] = np.array([[exact(*pair), f1(*pair)] for pair in zip(texts, golds, strict=True)])
    return asked.answer(predictions, np.zeros(len(golds)), ANSWER_SCORES)


def _mean_of(column: int) -> Score:
    return lambda predictions, references: float(predictions[:, column].mean())


ANSWER_SCORES: dict[str, dict[str, Score]] = {"f1": {"f1": _mean_of(1)}, "exact_match": {"exact match": _mean_of(0)}}


def answer_by_next_tokens(asked: Asked) -> Answers:
    """Compare how well each token is predicted from those before it, `(texts, 4)`."""
    columns, dataset = asked.columns, asked.dataset
    predictions: dict[str, np.ndarray] = {}
    if columns.label_column in dataset.column_names:
        dataset = dataset.remove_columns(columns.label_column)
    dataset = dataset.add_column(columns.label_column, [0.0] * len(dataset))
    for name, entry in asked.loaded.items():
        encoded = encode_text(dataset, entry.tokenizer, **columns.of_text)
        if entry.tokenizer.pad_token is None:  # what pads is not looked at
            entry.tokenizer.pad_token = entry.tokenizer.eos_token
        collate = DataCollatorWithPadding(entry.tokenizer)
        counts = predict_next_tokens(entry.model, encoded, data_collator=collate, batch_size=asked.batch_size)
        bytes_read = [len(entry.tokenizer.decode(ids[1:]).encode()) for ids in encoded["input_ids"]]
        predictions[name] = np.column_stack([counts, bytes_read])
    return asked.answer(predictions, np.zeros(len(dataset)), LANGUAGE_SCORES)


def _share(part: int, whole: int) -> Score:
    return lambda predictions, references: float(predictions[:, part].sum() / max(predictions[:, whole].sum(), 1))


def _perplexity(whole: int) -> Score:
    return lambda predictions, references: float(np.exp(_share(SURPRISE, whole)(predictions, references)))


SURPRISE, RIGHT, TOKENS, BYTES = range(4)
LANGUAGE_SCORES: dict[str, dict[str, Score]] = {
    "next_token": {"next token": _share(RIGHT, TOKENS)},
    "perplexity": {"perplexity": _perplexity(TOKENS), "perplexity by byte": _perplexity(BYTES)},
}
