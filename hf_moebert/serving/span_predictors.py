"""Predictors of spans: taggers and extractive question answering, which read long texts in windows."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TokenClassificationPipeline
from transformers.pipelines.base import pad_collate_fn
from transformers.pipelines.token_classification import AggregationStrategy

from hf_moebert.architectures.protocols import AnswerOptions
from hf_moebert.methods.masked_crf.pipeline import CrfTokenClassificationPipeline
from hf_moebert.methods.multitask.functional_answers import (
    QUESTION,
    TEXT,
    TOKENS,
    Example,
    context_spans,
    read_answer,
)

from .predictors import TextPredictor, not_finite, too_long


OVERLAP = 4  # a window shares one part of so many with the next
STRATEGY = AggregationStrategy.SIMPLE
# Inputs of models, and what the library of tokenizers calls them
PARTS = (("input_ids", "ids"), ("token_type_ids", "type_ids"), ("attention_mask", "attention_mask"))


class Tagger(TextPredictor):
    """A tagger, with a CRF or without; its answer is that of the pipeline of the task, with whole entities.

    A text is read in windows that overlap by a quarter, as with the pipeline's `stride`: no text is too long.

    Args:
        model: As for `TextPredictor`.
        tokenizer: As for `TextPredictor`.
        alone: As for `TextPredictor`.
    """

    kind = "tagging"
    forms = (TEXT, TOKENS)

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, *, alone: bool = False) -> None:
        super().__init__(model, tokenizer, alone=alone)
        crf = hasattr(model, "crf")
        cls = CrfTokenClassificationPipeline if crf else TokenClassificationPipeline
        self.pipeline = cls(model=model, tokenizer=tokenizer, task="token-classification", device="cpu")
        self.collate = pad_collate_fn(tokenizer, None)
        self.stride = self.max_length // OVERLAP

    def answer(self, requests: Sequence[tuple[Any, AnswerOptions]]) -> list[Any]:
        """Answer inputs: `{"entity_group", "score", "word", "start", "end"}` of each entity."""
        texts = [self.encode(inputs) for inputs, _ in requests]
        windows = [window for text in texts for window in text]
        lengths = [int(window["attention_mask"].sum()) for window in windows]
        found = iter(self.run(windows, lengths, self.compute))
        return [self.read_windows([next(found) for _ in text]) for text in texts]

    def encode(self, inputs: Any) -> list[dict[str, Any]]:
        """Return the windows of an input, one row of tensors each."""
        form, (text,) = self.read(inputs)
        windowed = {"return_overflowing_tokens": True, "padding": True, "stride": self.stride}
        words = {"is_split_into_words": form == TOKENS, "delimiter": " "}
        return list(self.pipeline.preprocess(text, tokenizer_params=windowed, **words))

    def compute(self, windows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the outputs of each window, one row of tensors each."""
        names = {name for window in windows for name in window}  # a list of words has more than a text
        tensors = {name for name in names if isinstance(windows[0].get(name), torch.Tensor)}
        batch = self.collate([{name: window[name] for name in tensors} for window in windows])
        found = self.pipeline.forward(batch | {name: [one.get(name) for one in windows] for name in names - tensors})
        return [{name: pick_row(value, row) for name, value in found.items()} for row in range(len(windows))]

    def read_windows(self, windows: list[dict[str, Any]]) -> Any:
        """Turn the windows of an input into its entities."""
        if not all(window["logits"].isfinite().all() for window in windows):
            return not_finite()
        return [plain(entity) for entity in self.pipeline.postprocess(windows, aggregation_strategy=STRATEGY)]


class QuestionAnswerer(TextPredictor):
    """A model that finds the answer to a question in a text, read in windows that overlap by a quarter.

    The answer is the likeliest span of at most 30 tokens of all windows, `{"answer", "score", "start", "end"}`.
    """

    kind = "question-answering"
    forms = (QUESTION,)

    def answer(self, requests: Sequence[tuple[Any, AnswerOptions]]) -> list[Any]:
        """Answer inputs; an error in place of an answer is that input's alone."""
        texts = [self.encode(inputs) for inputs, _ in requests]
        windows = [window for text in texts if not isinstance(text, Exception) for window in text]
        found = iter(self.run(windows, [len(window.ids) for window in windows], self.compute))
        return [
            text
            if isinstance(text, Exception)
            else self.read_windows([next(found) for _ in text], text, self.read(inputs)[1][1])
            for text, (inputs, _) in zip(texts, requests, strict=True)
        ]

    def encode(self, inputs: Any) -> Any:
        """Return the windows of an input, or the error of a question that leaves no room for the text."""
        question, context = self.read(inputs)[1]
        longest = len(self.tokenizer(question, "", verbose=False)["input_ids"])
        room = self.max_length - longest
        if room < OVERLAP:
            return too_long(longest, self.max_length - OVERLAP)
        encoded = self.tokenizer(
            question,
            context,
            truncation="only_second",
            max_length=self.max_length,
            stride=room // OVERLAP,
            return_overflowing_tokens=True,
        )
        return encoded.encodings

    def compute(self, windows: list[Any]) -> list[Any]:
        """Return logits of each window, `(2, seq)`: of starts and ends."""
        names = (*self.tokenizer.model_input_names, "attention_mask")
        parts = [(name, part) for name, part in PARTS if name in names]
        rows = [{name: getattr(window, part) for name, part in parts} for window in windows]
        batch = self.tokenizer.pad(rows, return_tensors="pt", verbose=False)
        outputs = self.model(**batch)
        return list(torch.stack([outputs.start_logits, outputs.end_logits], 1).float().cpu())

    def read_windows(self, found: list[Any], windows: list[Any], context: str) -> Any:
        """Return the likeliest answer of all windows."""
        if not all(logits.isfinite().all() for logits in found):
            return not_finite()
        answers = []
        for (starts, ends), window in zip(found, windows, strict=True):
            example = Example(context, QUESTION, None, context_spans(window), truncated=False)
            answers.append(read_answer(starts, ends, example))
        return max(answers, key=lambda answer: answer["score"])


def pick_row(value: Any, row: int) -> Any:
    """Return what one row of a batch has: of a tensor one row, of a list one element."""
    if isinstance(value, torch.Tensor):
        return value[row : row + 1]
    return value[row] if isinstance(value, list) else value


def plain(entity: dict[str, Any]) -> dict[str, Any]:
    """Return an entity in numbers of Python."""
    return {name: value.item() if hasattr(value, "item") else value for name, value in entity.items()}
