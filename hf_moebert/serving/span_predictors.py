"""Predictors of spans: taggers and extractive question answering, which read long texts in windows."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from tokenizers import Encoding

from hf_moebert.architectures.protocols import AnswerOptions
from hf_moebert.methods.multitask.functional_inputs import QUESTION, TEXT, TOKENS
from hf_moebert.methods.multitask.functional_spans import context_spans, find_answer

from .engines import Engine
from .predictors import TextPredictor, not_finite
from .rows import too_long
from .tags import CrfTags, Tags, TextWindows


OVERLAP = 4  # a window shares one part of so many with the next


class WindowPredictor(TextPredictor):
    """A model that says something about each token, of texts in windows."""

    def divide(self, outputs: list[np.ndarray], inputs: dict[str, np.ndarray], rows: list[Encoding]) -> list[Any]:
        """Return the logits of the tokens of each row: one array `(seq, ...)` for each output."""
        places = self.engine.reader.places
        return [
            [output[number, places(row, output.shape[1])] for output in outputs] for number, row in enumerate(rows)
        ]


class Tagger(WindowPredictor):
    """A tagger, with a CRF or without; its answer is that of the pipeline of the task, with whole entities.

    A text is read in windows that overlap by a quarter, as with the pipeline's `stride`: no text is too long.

    Args:
        engine: The model.
    """

    forms = (TEXT, TOKENS)

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.tags = Tags(engine) if engine.chain is None else CrfTags(engine, engine.chain)

    def answer(self, requests: Sequence[tuple[Any, AnswerOptions]]) -> list[Any]:
        """Answer inputs: `{"entity_group", "score", "word", "start", "end"}` of each entity."""
        texts = [self.encode(inputs) for inputs, _ in requests]
        logits = iter(self.run([window for text in texts for window in text.windows]))
        found = [[next(logits)[0] for _ in text.windows] for text in texts]
        fine = [place for place, one in enumerate(found) if all(np.isfinite(window).all() for window in one)]
        answers = self.tags.read([texts[place] for place in fine], [found[place] for place in fine])
        told = dict(zip(fine, answers, strict=True))
        return [told[place] if place in told else not_finite() for place in range(len(texts))]

    def encode(self, inputs: Any) -> TextWindows:
        """Return the windows of an input."""
        form, (text,) = self.read(inputs)
        sentence, words, inside = self.tags.divide(text, words=form == TOKENS)
        windows = self.rows.windows(words, words=bool(inside), stride=self.max_length // OVERLAP)
        return TextWindows(sentence, inside, [window for window in windows if len(window)])


class QuestionAnswerer(WindowPredictor):
    """A model that finds the answer to a question in a text, read in windows that overlap by a quarter.

    The answer is the likeliest span of at most 30 tokens of all windows, `{"answer", "score", "start", "end"}`.
    """

    forms = (QUESTION,)

    def answer(self, requests: Sequence[tuple[Any, AnswerOptions]]) -> list[Any]:
        """Answer inputs; an error in place of an answer is that input's alone."""
        texts = [self.encode(inputs) for inputs, _ in requests]
        found = iter(self.run([window for text in texts if isinstance(text, list) for window in text]))
        return [
            self.read_windows([next(found) for _ in text], text, self.read(inputs)[1][1])
            if isinstance(text, list)
            else text
            for text, (inputs, _) in zip(texts, requests, strict=True)
        ]

    def encode(self, inputs: Any) -> list[Encoding] | ValueError:
        """Return the windows of an input, or the error of a question that leaves no room for the text."""
        question, context = self.read(inputs)[1]
        longest = len(self.rows.tokenizer.encode(question, ""))
        room = self.max_length - longest
        if room < OVERLAP:
            return too_long(longest, self.max_length - OVERLAP)
        return self.rows.windows(question, context, stride=room // OVERLAP, strategy="only_second")

    def read_windows(self, found: list[Any], windows: list[Encoding], context: str) -> Any:
        """Return the likeliest answer of all windows."""
        if not all(np.isfinite(logits).all() for window in found for logits in window):
            return not_finite()
        answers = [
            find_answer(starts, ends, context_spans(window))
            for (starts, ends), window in zip(found, windows, strict=True)
        ]
        score, start, end = max(answers, key=lambda answer: answer[0])
        return {"answer": context[start:end], "score": score, "start": start, "end": end}
