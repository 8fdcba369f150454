"""The pipeline "masked-crf": from text to the segments of the best legal tag sequence."""

import re
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import BatchEncoding, TokenClassificationPipeline
from transformers.pipelines.token_classification import AggregationStrategy
from transformers.utils import logging

from .functional_segments import PIECE_PREFIXES, choose_windows, find_runs, plain_tags, read_window, split_tag, type_of
from .functional_tags import SCHEMES
from .modeling_words import find_words, has_sure_words, keep_words


logger = logging.get_logger(__name__)

UNSURE = (
    "The words of a text are what blanks separate, and each Chinese character: 'London.' is one word, and so are "
    "letters of a script without blanks. Set `word_boundaries` to 'tokenizer' to divide them as the tokenizer does, "
    "or to 'blanks' if blanks alone separate words; or give lists of words with `is_split_into_words`."
)
BOUNDARIES = ("auto", "tokenizer", "blanks")


class Word(NamedTuple):
    """A word: its tag, the tag's marginal probability, and its tokens as `TokenClassificationPipeline` gives them."""

    tag: str
    score: float
    pieces: list[dict[str, Any]]


class CrfTokenClassificationPipeline(TokenClassificationPipeline):
    """Token classification with a CRF, which decodes all words of a text together.

    The CRF sees the first piece of each word, as in training; later pieces follow their word. All strategies of
    `aggregation_strategy` but "none" return the decoded segments, since no word has two tags. Texts of more than one
    window (`stride`) are decoded as one sequence, each word scored where it is farthest from the edge of a window.

    A text is read as the list of its words: what blanks separate, and each Chinese character. What was tagged in lists
    of words, as in training, is so found in the text that they are joined to, with any tokenizer. Where the words of a
    text are not sure, as "London." may be one or two, a warning says so; `word_boundaries` names others: "tokenizer"
    for those of the tokenizer, which splits off punctuation, "blanks" for what blanks separate, in every script.

    Our own design: the score of a token is the marginal probability of its word's tag, and the score of a segment is
    the lowest of its words, an upper bound of the probability of the segment.

    Args:
        *args: As for `TokenClassificationPipeline`.
        **kwargs: As for `TokenClassificationPipeline`.

    Raises:
        ValueError: If the model has no CRF, or the tokenizer is not a fast one.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not hasattr(self.model, "crf"):
            raise ValueError(
                f"`model` must be a tagger with a CRF, got {type(self.model).__name__}. Make one with "
                "`CrfForTokenClassification.from_dense`, or use the task 'token-classification'."
            )
        if not getattr(self.tokenizer, "is_fast", False):
            raise ValueError(
                f"`tokenizer` must be a fast one, which knows words, got {type(self.tokenizer).__name__}. "
                "Load it with `AutoTokenizer`."
            )

    def _sanitize_parameters(self, word_boundaries: str | None = None, **kwargs: Any) -> tuple[dict, dict, dict]:
        preprocess, forward, postprocess = super()._sanitize_parameters(**kwargs)
        if word_boundaries not in (None, *BOUNDARIES):
            raise ValueError(f"`word_boundaries` must be one of {', '.join(BOUNDARIES)}, got {word_boundaries!r}.")
        return preprocess | ({"word_boundaries": word_boundaries} if word_boundaries else {}), forward, postprocess

    def preprocess(
        self, sentence: str | list[str], offset_mapping: Any = None, **preprocess_params: Any
    ) -> Iterator[dict[str, Any]]:
        """Tokenize one text, or one list of words, into windows, and mark where words begin."""
        split = preprocess_params.get("is_split_into_words", False)
        if isinstance(sentence, str) == split or offset_mapping is not None:
            raise ValueError(
                f"The input must be {'a list of words' if split else 'a text'} without `offset_mapping`, got "
                f"{type(sentence).__name__}. Set `is_split_into_words` for lists of words."
            )
        options = preprocess_params.get("tokenizer_params", {})
        if isinstance(sentence, str):
            text = sentence
            encoded, inside = self._encode_text(text, preprocess_params.get("word_boundaries"), options)
        else:
            delimiter = preprocess_params.get("delimiter") or ""
            text, starts = delimiter.join(sentence), [0, *accumulate(len(word) + len(delimiter) for word in sentence)]
            inside = [(start, start + len(word)) for start, word in zip(starts, sentence, strict=False)]
            encoded = self._encode(sentence, options)
        encoded.pop("overflow_to_sample_mapping", None)
        windows = encoded.pop("offset_mapping").tolist()  # (windows, seq, 2)
        begins: dict[int, int] = {}  # word: its first character; a window may start inside a word
        for window, places in enumerate(windows):
            words, spans, first_pieces = read_window(encoded.word_ids(window), places, text, inside, begins)
            yield {
                **{name: value[window][None] for name, value in encoded.items()},
                "word_mask": torch.tensor([first_pieces]),  # (1, seq)
                "words": torch.tensor([words]),  # (1, seq), 0: none
                "offsets": torch.tensor([spans]),  # (1, seq, 2)
                "is_last": window == len(windows) - 1,
            }

    def _encode_text(
        self, text: str, boundaries: str | None, options: dict[str, Any]
    ) -> tuple[BatchEncoding, list[tuple[int, int]]]:
        """Tokenize a text, and return the places of the words that offsets count in; none if in the text."""
        if boundaries == "tokenizer":
            encoded = self._encode(text, options)
            if _joins_words(encoded, text):
                raise ValueError(
                    f"`word_boundaries` must be 'auto' or 'blanks' for {type(self.tokenizer).__name__}, which takes "
                    "several words as one, got 'tokenizer'."
                )
            return encoded, []
        if boundaries == "blanks":
            words = [found.span() for found in re.finditer(r"\S+", text)]
        else:
            words = find_words(text)
            if not has_sure_words(text):
                logger.warning_once(UNSURE)
        return self._encode([text[start:end] for start, end in words], options), words

    def _encode(self, words: str | list[str], options: dict[str, Any]) -> BatchEncoding:
        if words and not isinstance(words, str):
            encoded = self.tokenizer([words], is_split_into_words=True, verbose=False)
            (words,) = keep_words(self.tokenizer, [words], encoded)
        return self.tokenizer(
            words or "",
            return_tensors="pt",
            return_offsets_mapping=True,
            truncation=self.tokenizer.model_max_length > 0,
            **options | {"is_split_into_words": bool(words) and not isinstance(words, str)},
        )

    def _forward(self, model_inputs: dict[str, Any]) -> dict[str, Any]:
        bookkeeping = {name: model_inputs.pop(name) for name in ("words", "offsets", "is_last")}
        outputs = self.model(**model_inputs, output_marginals=True)
        kept = {name: outputs[name] for name in ("logits", "predictions", "marginals")}
        return {"input_ids": model_inputs["input_ids"], "word_mask": model_inputs["word_mask"], **kept, **bookkeeping}

    def postprocess(
        self,
        all_outputs: list[dict[str, Any]],
        aggregation_strategy: AggregationStrategy = AggregationStrategy.NONE,
        ignore_labels: Sequence[str] | None = None,
    ) -> list[dict[str, Any]]:
        """Turn tags into entities: one per token under "none", otherwise one per segment."""
        ignored = ["O"] if ignore_labels is None else ignore_labels
        words = self._read_words(all_outputs)
        if aggregation_strategy == AggregationStrategy.NONE:
            tokens = [
                {"entity": tag, "score": word.score} | piece
                for word in words
                for tag, piece in zip(self._spell(word.tag, len(word.pieces)), word.pieces, strict=True)
            ]
            return [token for token in tokens if token["entity"] not in ignored]
        groups = [self._describe(words[run.start : run.stop]) for run in find_runs([word.tag for word in words])]
        return [group for group in groups if group["entity_group"] not in ignored]

    def _read_words(self, windows: list[dict[str, Any]]) -> list[Word]:
        """Collect the words of all windows of a text, each from where it is farthest from an edge."""
        words = [window["words"][0].tolist() for window in windows]
        firsts = [window["word_mask"][0].tolist() for window in windows]
        chosen = [(windows[number], positions) for number, positions in choose_windows(words, firsts)]
        if not chosen:
            return []
        tags, marginals = self._read_tags(chosen, together=len(windows) > 1)
        scores = marginals.gather(1, tags[:, None])[:, 0].tolist()
        names = plain_tags([self.model.config.id2label[tag] for tag in tags.tolist()], self.model.crf.tag_scheme)
        return [
            Word(name, score, [self._describe_token(window, position) for position in positions])
            for name, score, (window, positions) in zip(names, scores, chosen, strict=True)
        ]

    @torch.no_grad()
    def _read_tags(self, chosen: list[tuple[dict[str, Any], list[int]]], *, together: bool) -> tuple[Tensor, Tensor]:
        """Return tags and their probabilities, from one window as they are, of several windows decoded together."""

        def gather(name: str) -> Tensor:
            return torch.stack([window[name][0, positions[0]] for window, positions in chosen])

        if not together:
            return gather("predictions"), gather("marginals")  # (words,), (words, tags)
        emissions = gather("logits")[None].to(self.model.device)  # (1, words, tags)
        mask = torch.ones(emissions.shape[:2], dtype=torch.bool, device=emissions.device)
        crf = self.model.crf
        return crf.decode(emissions, mask)[0].cpu(), crf.marginals(emissions, mask)[0].cpu()

    def _describe_token(self, window: dict[str, Any], position: int) -> dict[str, Any]:
        start, end = window["offsets"][0, position].tolist()
        token = self.tokenizer.convert_ids_to_tokens(int(window["input_ids"][0, position]))
        return {"index": position, "word": token, "start": start, "end": end}

    def _describe(self, words: list[Word]) -> dict[str, Any]:
        pieces = [piece for word in words for piece in word.pieces]
        return {
            "entity_group": type_of(words[0].tag),
            "score": min(word.score for word in words),
            "word": self.tokenizer.convert_tokens_to_string([piece["word"] for piece in pieces]),
            "start": pieces[0]["start"],
            "end": pieces[-1]["end"],
        }

    def _spell(self, tag: str, count: int) -> list[str]:
        """Return the tags of the pieces of a word, in the same scheme."""
        prefix, kind = split_tag(tag)
        if count == 1 or prefix not in PIECE_PREFIXES or (not kind and self.model.crf.tag_scheme not in SCHEMES):
            return [tag] * count
        spelled = PIECE_PREFIXES[prefix].replace("I", "M" if self.model.crf.tag_scheme == "BMES" else "I")
        return [piece + tag[1:] for piece in spelled[0] + spelled[1] * (count - 2) + spelled[2]]


def _joins_words(encoded: BatchEncoding, text: str) -> bool:
    """Check whether the tokenizer takes several words, with blanks between them, as one."""
    for window, places in enumerate(encoded["offset_mapping"].tolist()):
        spans: dict[int, tuple[int, int]] = {}  # first and last character of each word
        for word, (start, end) in zip(encoded.word_ids(window), places, strict=True):
            if word is not None:
                spans[word] = (spans.get(word, (start, end))[0], end)
        if any(len(text[start:end].split()) > 1 for start, end in spans.values()):
            return True
    return False
