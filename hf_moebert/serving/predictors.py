"""Predictors of one task: classifiers, rerankers and embedders, whose inputs are rows of tokens."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from hf_moebert.architectures.functional_pooling import pool, unit_length
from hf_moebert.architectures.pooling import EmbeddingForm
from hf_moebert.architectures.positions import count_positions
from hf_moebert.architectures.protocols import AnswerOptions
from hf_moebert.data.buckets import run_by_length
from hf_moebert.methods.multitask.functional_answers import PAIR, TEXT, read_input


MOST_ROWS = 32  # of a forward pass: a long text falls apart into many
SHORTEST_WHERE_PADDING_IS_FREE = 1e-9  # a share of the longest: all go together
NO_LIMIT = 10**9  # tokens; tokenizers that know no limit say 1e30


class TextTooLong(ValueError):
    """A text has more tokens than the model takes."""


class NotFinite(RuntimeError):
    """A model computed NaN or infinity."""


class Embedding(NamedTuple):
    """The answer of an embedder: a vector in float32, `(hidden,)`, and the tokens it was made of."""

    vector: np.ndarray
    tokens: int


class TextPredictor(ABC):
    """A model of one task, for inputs of certain forms.

    Args:
        model: A model in eval mode, of transformers or this package, or one that `load_onnx` returned.
        tokenizer: Its tokenizer, a fast one.
        alone: Whether every text runs by itself, because its answer would depend on the others in its batch.

    Raises:
        ValueError: If the tokenizer is not a fast one, or has no token for padding.
    """

    forms: tuple[tuple[str, ...], ...] = (TEXT,)

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, *, alone: bool = False) -> None:
        if not tokenizer.is_fast or tokenizer.pad_token_id is None:
            problem = "has no token for padding" if tokenizer.is_fast else "is not a fast one"
            raise ValueError(
                f"`tokenizer` must be a fast one that pads, but {type(tokenizer).__name__} {problem}. Save the "
                "tokenizer that the model was trained with."
            )
        self.model, self.tokenizer, self.alone = model, tokenizer, alone
        tokenizer.model_max_length = self.max_length = count_tokens_taken(model, tokenizer)

    @property
    @abstractmethod
    def kind(self) -> str:
        """Return the kind of model, by which routes know what it can answer."""

    @abstractmethod
    def answer(self, requests: Sequence[tuple[Any, AnswerOptions]]) -> list[Any]:
        """Answer inputs, each with its own options; an error in place of an answer is that input's alone."""

    def describe(self) -> dict[str, Any]:
        """Return kind, class, labels and longest text."""
        labels = list((self.model.config.id2label or {}).values())
        return {"kind": self.kind, "labels": labels, "max_length": self.max_length}

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

    @torch.no_grad()
    def run(
        self, rows: Sequence[Any], lengths: Sequence[int], call: Callable[[list[Any]], Sequence[Any]]
    ) -> list[Any]:
        """Run rows through the model, those of like length together, where padding costs time.

        Args:
            rows: What is run.
            lengths: Tokens of each.
            call: Runs some of them, and returns a result for each.

        Returns:
            The result of each row.
        """
        most = 1 if self.alone else MOST_ROWS
        shortest = SHORTEST_WHERE_PADDING_IS_FREE if skips_padding(self.model) else 0.75
        return run_by_length(rows, lengths, call, batch_size=most, shortest=shortest)


class RowPredictor(TextPredictor):
    """A model that reads every input as one row of tokens, and says one thing about it."""

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, *, alone: bool = False) -> None:
        super().__init__(model, tokenizer, alone=alone)
        self.pad = DataCollatorWithPadding(tokenizer)

    @abstractmethod
    def parts(self, inputs: Any, options: AnswerOptions) -> list[str]:
        """Return the texts of an input, one or a pair."""

    @abstractmethod
    def compute(self, batch: dict[str, Tensor]) -> Tensor:
        """Return one row of numbers for each row of a batch, in float32."""

    @abstractmethod
    def read_row(self, row: np.ndarray, tokens: int, options: AnswerOptions) -> Any:
        """Turn the numbers of an input into its answer."""

    def answer(self, requests: Sequence[tuple[Any, AnswerOptions]]) -> list[Any]:
        """Answer inputs, each with its own options; an error in place of an answer is that input's alone."""
        rows = [self.encode(self.parts(inputs, options), options) for inputs, options in requests]
        places = [place for place, row in enumerate(rows) if not isinstance(row, Exception)]
        answers: list[Any] = list(rows)  # errors stay
        kept = [rows[place] for place in places]
        lengths = [len(row["input_ids"]) for row in kept]
        found = self.run(kept, lengths, lambda part: list(self.compute(self.pad(part).data).numpy()))
        for place, numbers, length in zip(places, found, lengths, strict=True):
            options = requests[place][1]
            answers[place] = self.read_row(numbers, length, options) if np.isfinite(numbers).all() else not_finite()
        return answers

    def encode(self, parts: list[str], options: AnswerOptions) -> Any:
        """Return the tokens of an input, or the error of one that is too long."""
        encoded = self.tokenizer(*parts, truncation=options.truncate, max_length=self.max_length, verbose=False)
        tokens = len(encoded["input_ids"])
        return encoded if tokens <= self.max_length else too_long(tokens, self.max_length)


class Classifier(RowPredictor):
    """A model with a score for each label: of one label per text or several, of numbers, or of a pair's relevance.

    Its answer is that of `pipeline("text-classification", top_k=None)`: all labels with their scores, highest first.
    """

    forms = (TEXT, PAIR)

    @property
    def kind(self) -> str:
        """Return `classification`, `multi-label`, `regression`, or `reranking` for one score."""
        config = self.model.config
        if config.problem_type == "multi_label_classification":
            return "multi-label"
        if config.problem_type == "regression":
            return "regression"
        return "reranking" if config.num_labels == 1 else "classification"

    def parts(self, inputs: Any, options: AnswerOptions) -> list[str]:
        """Return the text or the pair."""
        return self.read(inputs)[1]

    def compute(self, batch: dict[str, Tensor]) -> Tensor:
        """Return logits, `(batch, labels)`."""
        return self.model(**batch).logits.float().cpu()

    def read_row(self, row: np.ndarray, tokens: int, options: AnswerOptions) -> list[dict[str, Any]]:
        """Return `{"label", "score"}` of each label, the highest score first."""
        raw = options.raw_scores or self.kind == "regression"
        scores = row if raw else softmax(row) if self.kind == "classification" else sigmoid(row)
        labels = self.model.config.id2label
        found = [{"label": labels[number], "score": float(score)} for number, score in enumerate(scores)]
        return sorted(found, key=lambda one: -one["score"])


class Embedder(RowPredictor):
    """A model without head, whose hidden states are pooled as its folder of sentence-transformers says.

    Args:
        model: As for `TextPredictor`.
        tokenizer: As for `TextPredictor`.
        form: Pooling, normalisation, prompts and length.
        alone: As for `TextPredictor`.
    """

    kind = "embedding"

    def __init__(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, form: EmbeddingForm, *, alone: bool = False
    ) -> None:
        super().__init__(model, tokenizer, alone=alone)
        self.form = form
        tokenizer.model_max_length = self.max_length = min(self.max_length, form.max_length or NO_LIMIT)

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

    def compute(self, batch: dict[str, Tensor]) -> Tensor:
        """Return pooled states, `(batch, hidden)`."""
        states = self.model(**batch).last_hidden_state
        return pool(states, batch["attention_mask"], self.form.pooling).cpu()

    def read_row(self, row: np.ndarray, tokens: int, options: AnswerOptions) -> Embedding:
        """Return the embedding, of the length 1 if the client or the folder says so."""
        normalize = self.form.normalize if options.normalize is None else options.normalize
        return Embedding(unit_length(torch.from_numpy(row)).numpy() if normalize else row, tokens)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Turn logits into probabilities, as the pipelines of transformers do: `(labels,)`."""
    shifted = np.exp(logits - logits.max())
    return shifted / shifted.sum()


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Turn logits into independent probabilities, without an overflow: `(labels,)`."""
    return np.exp(-np.logaddexp(0, -logits))


def too_long(tokens: int, max_length: int) -> TextTooLong:
    """Return the error of a text that is too long."""
    return TextTooLong(
        f"A text must have at most {max_length} tokens, got {tokens}. Send it in parts, or with `truncate`: true to "
        "cut it."
    )


def not_finite() -> NotFinite:
    """Return the error of a model that computed NaN or infinity."""
    return NotFinite("The model computed NaN or infinity. Train it again at a lower rate, or serve float32.")


def skips_padding(model: Any) -> bool:
    """Check whether a model is optimised so that padding costs nothing."""
    return "unpadding" in vars(getattr(model, "base_model", None) or model)


def count_tokens_taken(model: Any, tokenizer: PreTrainedTokenizerBase) -> int:
    """Count the tokens that a model and its tokenizer take of a text."""
    positions = model.max_length if hasattr(model, "exported") else count_positions(model)
    return int(min(tokenizer.model_max_length, NO_LIMIT if positions is None else positions, NO_LIMIT))
