"""Predictors of one task: classifiers, rerankers and embedders, whose inputs are rows of tokens."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Encoding

from hf_moebert.architectures.embedding_form import EmbeddingForm
from hf_moebert.architectures.protocols import AnswerOptions
from hf_moebert.data.buckets import run_by_length
from hf_moebert.methods.multitask.functional_inputs import PAIR, TEXT, read_input
from hf_moebert.runtime.answers import pool, rank_labels, score_labels, unit_length

from .engines import Engine
from .rows import RowReader


MOST_ROWS = 32  # that run together


class NotFinite(RuntimeError):
    """A model computed NaN or infinity."""


class Embedding(NamedTuple):
    """The answer of an embedder: a vector in float32, `(hidden,)`, and the tokens it was made of."""

    vector: np.ndarray
    tokens: int


class TextPredictor(ABC):
    """A model of one task, for inputs of certain forms.

    Args:
        engine: The model.
    """

    forms: tuple[tuple[str, ...], ...] = (TEXT,)

    def __init__(self, engine: Engine) -> None:
        self.engine, self.kind, self.rows = engine, engine.kind, RowReader(engine.reader)
        self.max_length = self.rows.max_length

    @abstractmethod
    def answer(self, requests: Sequence[tuple[Any, AnswerOptions]]) -> list[Any]:
        """Answer inputs, each with its own options; an error in place of an answer is that input's alone."""

    @abstractmethod
    def divide(self, outputs: list[np.ndarray], inputs: dict[str, np.ndarray], rows: list[Encoding]) -> list[Any]:
        """Return the part of each row in the outputs of a batch."""

    def describe(self) -> dict[str, Any]:
        """Return kind, labels and longest text."""
        return {"kind": self.kind, "labels": self.engine.labels, "max_length": self.max_length}

    def check(self, inputs: Any, options: AnswerOptions) -> None:
        """Refuse an input of a form that the model does not read.

        Raises:
            ValueError: If it is one.
        """
        self.read(inputs)

    def read(self, inputs: Any) -> tuple[tuple[str, ...], list[Any]]:
        """Return the form of an input and its parts.

        Raises:
            ValueError: If the model does not read it.
        """
        form, parts = read_input(inputs)
        if form not in self.forms:
            known = " or ".join(str(list(one)) for one in self.forms)
            raise ValueError(f"An input must hold {known} for a model for {self.kind}, got {list(form)}.")
        return form, parts

    def run(self, rows: list[Encoding]) -> list[Any]:
        """Run rows through the model, those of like length together, and return what `divide` makes of each."""
        engine = self.engine

        def call(part: list[Encoding]) -> list[Any]:
            inputs = engine.reader.batch(part)
            return self.divide(engine.run(inputs), inputs, part)

        lengths = [len(row) for row in rows]
        return run_by_length(rows, lengths, call, batch_size=MOST_ROWS, shortest=engine.shortest)


class RowPredictor(TextPredictor):
    """A model that reads every input as one row of tokens, and says one thing about it."""

    @abstractmethod
    def parts(self, inputs: Any, options: AnswerOptions) -> list[str]:
        """Return the texts of an input, one or a pair."""

    @abstractmethod
    def read_row(self, row: np.ndarray, tokens: int, options: AnswerOptions) -> Any:
        """Turn the numbers of an input into its answer."""

    def answer(self, requests: Sequence[tuple[Any, AnswerOptions]]) -> list[Any]:
        """Answer inputs, each with its own options; an error in place of an answer is that input's alone."""
        answers = [self.encode(inputs, options) for inputs, options in requests]  # rows and errors, which stay
        places = [place for place, row in enumerate(answers) if isinstance(row, Encoding)]
        rows = [answers[place] for place in places]
        for place, row, numbers in zip(places, rows, self.run(rows), strict=True):
            fine = np.isfinite(numbers).all()
            answers[place] = self.read_row(numbers, len(row), requests[place][1]) if fine else not_finite()
        return answers

    def encode(self, inputs: Any, options: AnswerOptions) -> Any:
        """Return the tokens of an input, or the error of one that is too long."""
        try:
            return self.rows.encode(*self.parts(inputs, options), truncate=options.truncate)
        except ValueError as error:
            return error


class Classifier(RowPredictor):
    """A model with a score for each label: of one label per text or several, of numbers, or of a pair's relevance.

    Its answer is that of `pipeline("text-classification", top_k=None)`: all labels with their scores, highest first.
    """

    forms = (TEXT, PAIR)

    def parts(self, inputs: Any, options: AnswerOptions) -> list[str]:
        """Return the text or the pair."""
        return self.read(inputs)[1]

    def divide(self, outputs: list[np.ndarray], inputs: dict[str, np.ndarray], rows: list[Encoding]) -> list[Any]:
        """Return the logits of each row, `(labels,)`."""
        return list(outputs[0])

    def read_row(self, row: np.ndarray, tokens: int, options: AnswerOptions) -> list[dict[str, Any]]:
        """Return `{"label", "score"}` of each label, the highest score first."""
        return rank_labels(row if options.raw_scores else score_labels(row, self.kind), self.engine.labels)


class Embedder(RowPredictor):
    """A model without head, whose hidden states are pooled as its folder of sentence-transformers says.

    Args:
        engine: The model.
        form: Pooling, normalisation, prompts and length.
    """

    def __init__(self, engine: Engine, form: EmbeddingForm) -> None:
        super().__init__(engine)
        self.form = form
        self.rows.max_length = self.max_length = min(self.max_length, form.max_length or self.max_length)

    def describe(self) -> dict[str, Any]:
        """Return kind, pooling, prompts and longest text."""
        form = self.form
        said = {"pooling": form.pooling, "normalize": form.normalize, "prompts": sorted(form.prompts)}
        return {"kind": self.kind, "max_length": self.max_length} | said

    def check(self, inputs: Any, options: AnswerOptions) -> None:
        """Refuse an input that is no text, and a prompt that the folder does not have.

        Raises:
            ValueError: If it is one.
        """
        super().check(inputs, options)
        if options.prompt_name is not None and options.prompt_name not in self.form.prompts:
            raise ValueError(
                f"`prompt_name` must be one of {sorted(self.form.prompts)}, got {options.prompt_name!r:.100}. Leave "
                "it out for texts of no stated kind."
            )

    def parts(self, inputs: Any, options: AnswerOptions) -> list[str]:
        """Return the text behind its prompt."""
        form = self.form
        prompt = form.prefix if options.prompt_name is None else form.prompts[options.prompt_name]
        return [prompt + self.read(inputs)[1][0]]

    def divide(self, outputs: list[np.ndarray], inputs: dict[str, np.ndarray], rows: list[Encoding]) -> list[Any]:
        """Return the pooled states of each row, `(hidden,)`."""
        return list(pool(outputs[0], inputs["attention_mask"], self.form.pooling))

    def read_row(self, row: np.ndarray, tokens: int, options: AnswerOptions) -> Embedding:
        """Return the embedding, of the length 1 if the client or the folder says so."""
        normalize = self.form.normalize if options.normalize is None else options.normalize
        return Embedding(unit_length(row) if normalize else row, tokens)


def not_finite() -> NotFinite:
    """Return the error of a model that computed NaN or infinity."""
    return NotFinite("The model computed NaN or infinity. Train it again at a lower rate, or serve float32.")
