"""Kinds of tasks: how their examples are encoded to learn from, and labelled by the given model where nobody did."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_moebert.architectures.heads import has_head
from hf_moebert.architectures.pooling import EmbeddingForm, read_embedding_form
from hf_moebert.data import encode_text, encode_tokens
from hf_moebert.data.questions import ANSWERS, encode_questions
from hf_moebert.data.words import find_words
from hf_moebert.measuring.answers import TextColumns, read_label_sets
from hf_moebert.measuring.answers_of_tokens import OUTSIDE, tag_columns
from hf_moebert.measuring.predictions import predict_answers, predict_embeddings, predict_logits, predict_tags
from hf_moebert.measuring.ranking import find_groups


CAUSAL = ("ForCausalLM", "LMHeadModel")
GROUP = "group"  # column of encoded rows of a reranker: the number of the query


class Task:
    """A task, and its examples.

    Args:
        model: The given model.
        tokenizer: Its tokenizer.
        columns: Names of the columns of all data.

    Attributes:
        scored: The columns of what `label` returns.
        collator: Pads encoded examples.
        form: How a model without head makes embeddings.
        group_column: Column of encoded rows that numbers queries.
    """

    form: EmbeddingForm | None = None
    group_column: str | None = None

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, columns: TextColumns) -> None:
        self.model, self.tokenizer, self.columns, self.scored = model, tokenizer, columns, columns
        self.collator: Callable[[list[dict[str, Any]]], Any] = DataCollatorWithPadding(tokenizer)

    def is_labelled(self, texts: Dataset) -> bool:
        """Return whether examples have labels."""
        return self.scored.label_column in texts.column_names

    def encode(self, texts: Dataset) -> Dataset:
        """Encode examples, with their labels if they have any."""
        raise NotImplementedError

    def label(self, texts: Dataset) -> Dataset:
        """Add what the given model predicts where there are no labels."""
        raise NotImplementedError

    def read(self, texts: Dataset) -> list[str]:
        """Return all texts as the model is given them."""
        names = (self.columns.text_column, self.columns.text_pair_column)
        return [text for name in names if name in texts.column_names for text in texts[name][:]]


class Labelling(Task):
    """Texts, or pairs of them, with a class or a number each."""

    @property
    def names(self) -> list[str] | None:
        """Names of the classes; None for a number."""
        config = self.model.config
        return None if config.num_labels == 1 else [name for _, name in sorted(config.id2label.items())]

    def encode(self, texts: Dataset) -> Dataset:
        """Encode examples, with their labels if they have any."""
        if self.is_labelled(texts):
            return encode_text(texts, self.tokenizer, label_names=self.names, **self.columns.of_text)
        return encode_unlabelled(texts, self.tokenizer, self.columns)

    def label(self, texts: Dataset) -> Dataset:
        """Add what the given model predicts where there are no labels."""
        if self.is_labelled(texts):
            return texts
        logits = self.predict(texts)  # (examples, labels)
        if self.names is None:
            labels: list[Any] = logits[:, 0].astype(np.float64).tolist()
        else:
            labels = [self.names[index] for index in logits.argmax(-1)]
        return texts.add_column(self.columns.label_column, labels)

    def predict(self, texts: Dataset) -> np.ndarray:
        """Return the logits of the given model, `(examples, labels)`."""
        return predict_logits(self.model, self.encode(texts), data_collator=self.collator)


class LabelSets(Labelling):
    """Texts, or pairs of them, with any number of labels each."""

    def encode(self, texts: Dataset) -> Dataset:
        """Encode examples, with a number for each label, 0 or 1, if they have any."""
        if not self.is_labelled(texts):
            return encode_unlabelled(texts, self.tokenizer, self.columns)
        numbers = read_label_sets(texts, self.columns.label_column, self.names or []).astype(float)
        encoded = encode_unlabelled(texts.remove_columns(self.columns.label_column), self.tokenizer, self.columns)
        return encoded.add_column("labels", numbers.tolist())

    def label(self, texts: Dataset) -> Dataset:
        """Add the labels that the given model finds likelier than not where there are none."""
        if self.is_labelled(texts):
            return texts
        found = self.predict(texts) > 0  # (examples, labels)
        names = np.array(self.names)
        return texts.add_column(self.columns.label_column, [names[row].tolist() for row in found])


class Ranking(Labelling):
    """Pairs of a query and a document with a score, whose order within a query counts."""

    group_column = GROUP

    def encode(self, texts: Dataset) -> Dataset:
        """Encode examples, with their labels if they have any."""
        groups = find_groups(texts, str(self.columns.group_column))
        numbers = np.empty(len(texts), dtype=np.int64)
        for number, rows in enumerate(groups):
            numbers[rows] = number
        order = np.concatenate(groups)  # those of a query side by side
        return super().encode(texts).add_column(GROUP, numbers.tolist()).select(order)

    def label(self, texts: Dataset) -> Dataset:
        """Call the document that the given model puts first the relevant one where there are no labels."""
        if self.is_labelled(texts):
            return texts
        scores, labels = np.empty(len(texts)), np.zeros(len(texts))
        groups = find_groups(texts, str(self.columns.group_column))
        scores[np.concatenate(groups)] = self.predict(texts)[:, 0]
        for rows in groups:
            labels[rows[scores[rows].argmax()]] = 1
        return texts.add_column(self.columns.label_column, labels.tolist())


class Tagging(Task):
    """Lists of words, with a tag each; texts are divided into theirs."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, columns: TextColumns) -> None:
        super().__init__(model, tokenizer, columns)
        self.collator = DataCollatorForTokenClassification(tokenizer)
        self.names = [name for _, name in sorted(model.config.id2label.items())]
        self.scored = replace(columns, text_column="tokens", label_column="tags")

    def is_labelled(self, texts: Dataset) -> bool:
        """Return whether examples have labels."""
        return tag_columns(self.columns, texts)[1] in texts.column_names

    def encode(self, texts: Dataset) -> Dataset:
        """Encode examples, with their labels if they have any."""
        encoded = self._encode(self._divide(texts))
        return encoded if self.is_labelled(texts) else encoded.remove_columns("labels")

    def label(self, texts: Dataset) -> Dataset:
        """Add what the given model predicts where there are no labels."""
        labelled, texts = self.is_labelled(texts), self._divide(texts)
        if labelled:
            return texts
        found = predict_tags(self.model, self._encode(texts), data_collator=self.collator)
        rows = zip(found, texts["tokens"], strict=True)
        tags = [[self.names[tag] for tag in row] + [OUTSIDE] * (len(words) - len(row)) for row, words in rows]
        return texts.remove_columns("tags").add_column("tags", tags)

    def read(self, texts: Dataset) -> list[str]:
        """Return all texts as the model is given them."""
        return [" ".join(words) for words in self._divide(texts)["tokens"]]

    def _divide(self, texts: Dataset) -> Dataset:
        """Return words and tags, the first of all tags where there are none."""
        tokens, tags = tag_columns(self.columns, texts)
        words = texts[tokens][:]
        if words and isinstance(words[0], str):
            words = [[text[start:end] for start, end in find_words(text)] for text in words]
        given = texts[tags][:] if tags in texts.column_names else [[self.names[0]] * len(row) for row in words]
        return Dataset.from_dict({"tokens": words, "tags": given})

    def _encode(self, divided: Dataset) -> Dataset:
        return encode_tokens(divided, self.tokenizer, tag_names=self.names, max_length=self.columns.max_length)


class Answering(Task):
    """Questions with a context that holds the answer, in the columns of SQuAD."""

    def is_labelled(self, texts: Dataset) -> bool:
        """Return whether there are answers."""
        return ANSWERS in texts.column_names

    def encode(self, texts: Dataset) -> Dataset:
        """Encode questions, with the places of their answers if they have any."""
        encoded = encode_questions(texts, self.tokenizer, max_length=self.columns.max_length)
        beside = {*texts.column_names, "offset_mapping", "context_tokens"}
        return encoded.remove_columns([name for name in encoded.column_names if name in beside])

    def label(self, texts: Dataset) -> Dataset:
        """Add the answers of the given model where there are none."""
        if self.is_labelled(texts):
            return texts
        encoded = encode_questions(texts, self.tokenizer, max_length=self.columns.max_length)
        found = predict_answers(self.model, encoded, data_collator=self.collator)
        rows = zip(texts["context"], found, strict=True)
        answers = [{"text": [answer], "answer_start": [context.find(answer)]} for context, answer in rows]
        return texts.add_column(ANSWERS, answers)

    def read(self, texts: Dataset) -> list[str]:
        """Return all questions and contexts."""
        return [*texts["question"][:], *texts["context"][:]]


class Language(Task):
    """Texts whose tokens a causal language model predicts, each from those before it: they are their own labels."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, columns: TextColumns) -> None:
        super().__init__(model, tokenizer, replace(columns, text_pair_column=None))
        if tokenizer.pad_token is None:  # what pads is not looked at
            tokenizer.pad_token = tokenizer.eos_token
        self.collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)

    def is_labelled(self, texts: Dataset) -> bool:
        """Return that all texts are their own labels."""
        return True

    def encode(self, texts: Dataset) -> Dataset:
        """Encode texts; the collator makes the labels."""
        alone = texts.select_columns([self.columns.text_column])
        return encode_unlabelled(alone, self.tokenizer, self.columns)

    def label(self, texts: Dataset) -> Dataset:
        """Return texts as they are."""
        return texts


class Embedding(Task):
    """Texts alone, or pairs of them with a number that says how alike they are."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, columns: TextColumns) -> None:
        super().__init__(model, tokenizer, columns)
        self.form = read_embedding_form(model.name_or_path)
        self.pairs = columns.text_pair_column is not None
        self.scored = columns if self.pairs else replace(columns, text_pair_column=f"{columns.text_column} behind")

    def is_labelled(self, texts: Dataset) -> bool:
        """Return whether examples have labels."""
        return self.pairs and self.columns.label_column in texts.column_names

    def encode(self, texts: Dataset) -> Dataset:
        """Encode examples, with their labels if they have any."""
        alone = replace(self.columns, text_pair_column=None)
        return encode_unlabelled(Dataset.from_dict({alone.text_column: self.read(texts)}), self.tokenizer, alone)

    def read(self, texts: Dataset) -> list[str]:
        """Return all texts as the model is given them."""
        assert self.form is not None  # `check_task` saw to it
        return [self.form.prefix + text for text in super().read(texts)]

    def label(self, texts: Dataset) -> Dataset:
        """Add how alike the given model finds the texts of a pair: by default each and the next one."""
        if self.is_labelled(texts):
            return texts
        first, second = self.scored.text_column, str(self.scored.text_pair_column)
        texts = texts.select_columns([name for name in (first, second) if name in texts.column_names])
        if not self.pairs:
            texts = texts.add_column(second, [*texts[first][1:], texts[first][0]])
        sides = [self._embed(texts[name][:]) for name in (first, second)]  # (pairs, hidden) each
        return texts.add_column(self.scored.label_column, (sides[0] * sides[1]).sum(-1).astype(np.float64).tolist())

    def _embed(self, texts: Sequence[str]) -> np.ndarray:
        assert self.form is not None
        encoded = self.encode(Dataset.from_dict({self.columns.text_column: list(texts)}))
        return predict_embeddings(self.model, encoded, data_collator=self.collator, pooling=self.form.pooling)


def task_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, columns: TextColumns) -> Task:
    """Return the task of a model."""
    if not has_head(model):
        return Embedding(model, tokenizer, columns)
    name = type(model).__name__
    if name.endswith("ForTokenClassification"):
        return Tagging(model, tokenizer, columns)
    if name.endswith(CAUSAL):
        return Language(model, tokenizer, columns)
    if name.endswith("ForQuestionAnswering"):
        return Answering(model, tokenizer, columns)
    if model.config.problem_type == "multi_label_classification":
        return LabelSets(model, tokenizer, columns)
    return (Labelling if columns.group_column is None else Ranking)(model, tokenizer, columns)


def encode_unlabelled(texts: Dataset, tokenizer: PreTrainedTokenizerBase, columns: TextColumns) -> Dataset:
    """Encode texts without labels."""
    texts = texts.add_column(columns.label_column, [0.0] * len(texts))
    return encode_text(texts, tokenizer, **columns.of_text).remove_columns("labels")
