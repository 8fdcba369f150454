"""Leave the tokens that a corpus does not use out of a model and its tokenizer."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from hf_moebert.architectures.positions import LEARNED
from hf_moebert.architectures.protocols import ManyTasks

from .conversion_models import build_like, check_model, edit_config, fill, name_nested
from .conversion_tokenizer import Pieces, build_tokenizer, read_json, renumber, split_into_words


logger = logging.get_logger(__name__)
BATCH = 1000  # texts that are tokenized at once
UNSEEN = 0.05  # share of the tokens of further texts that are likely unseen, from which on there are too few texts
Model = TypeVar("Model", bound=PreTrainedModel)


def trim_vocabulary(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str] | None = None,
    *,
    keep: Sequence[str | int] = (),
    coverage: float = 1.0,
) -> tuple[Model, PreTrainedTokenizerBase]:
    """Copy a model and its tokenizer without the tokens that a corpus does not use.

    Every text of the corpus is split into the same tokens as before, and the model answers the same. Other texts may
    be split more finely, but nothing becomes unencodable that was not: single characters or bytes stay, pieces with a
    character that is no piece of its own, and every piece on the way of merges to one that stays. So do all added
    tokens and those that the configurations name. The numbers of tokens keep their order.

    Args:
        model: A model of transformers, or in a form of this package, that reads token ids. It is not changed.
        tokenizer: Its tokenizer, with a tokenizer.json: WordPiece, BPE or Unigram. It is not changed.
        texts: The corpus. Give it as the model is given it, with prefixes such as `query: `.
        keep: Tokens, or their ids, that stay besides; or, without texts, the ones that do.
        coverage: Share of the tokens of the corpus, by how often they occur, that stay, in (0, 1]. Below 1 the rarest
            ones go, too, and texts that hold them are split more finely.

    Returns:
        The smaller model, of the same class with the same head, dtype, device and mode, and the smaller tokenizer. Of
        a class of transformers they load without this package.

    Raises:
        ValueError: If the model has no plain word embeddings, the tokenizer is not that of the model or has no rule
            here, there are no texts, or most of their tokens are unknown.

    Source: Abdaoui et al. 2020, https://arxiv.org/abs/2010.05609, who keep the tokens of chosen languages. The rules
    by which nothing becomes unencodable are our own design.
    """
    check_model(model)
    if not 0 < coverage <= 1:
        raise ValueError(f"`coverage` must be in (0, 1], got {coverage}. Use 1 to keep all tokens of the texts.")
    data = read_json(tokenizer)
    pieces = Pieces(data)
    _check_sizes(model, pieces)
    corpus = _check_texts(texts, keep)
    counts = _count_tokens(tokenizer, corpus)
    if corpus:
        _check_language(pieces, tokenizer, counts)
    used = _cover(counts, coverage) | _find_ids(pieces, keep) | pieces.always_kept | _named_ids(model)
    used |= pieces.unknown_paths(_unknown_words(tokenizer, pieces, corpus) if coverage == 1 else ())
    known, fixed = set(pieces.ids.values()) | set(pieces.added.values()), set(range(_first_position(model)))
    kept = (pieces.close(used | fixed) | used) & known | fixed
    new = {old: number for number, old in enumerate([*sorted(kept), *sorted(used - kept)])}
    trimmed = build_tokenizer(tokenizer, renumber(data, new))
    if coverage == 1:
        _check_equal(tokenizer, trimmed, new, corpus)
    return _trim_rows(model, new), trimmed


@dataclass(frozen=True)
class Splitting:
    """How a trimmed tokenizer splits texts, beside the whole one.

    Attributes:
        tokens_per_word: Mean of the whole tokenizer; words are what blanks separate.
        trimmed_tokens_per_word: Mean of the trimmed one.
        same_texts: Share of the texts that are split alike.
        unknown: Share of the tokens that the whole tokenizer does not know.
        trimmed_unknown: Share of those that the trimmed one does not know.
    """

    tokens_per_word: float
    trimmed_tokens_per_word: float
    same_texts: float
    unknown: float
    trimmed_unknown: float


def compare_splitting(
    tokenizer: PreTrainedTokenizerBase, trimmed: PreTrainedTokenizerBase, texts: Iterable[str]
) -> Splitting:
    """Compare how a tokenizer and its trimmed form split texts that the trimming has not seen.

    Raises:
        ValueError: If there are no words in the texts.
    """
    texts = list(texts)
    words = sum(len(text.split()) for text in texts)
    if not words:
        raise ValueError("`texts` must have words, got none. Give texts that were held out.")
    rows, sizes, unknown = [], [], []
    for one in (tokenizer, trimmed):
        found = [one.convert_ids_to_tokens(ids) for ids in _encode(one, texts)]
        rows.append(found)
        sizes.append(sum(map(len, found)))
        unknown.append(sum(row.count(one.unk_token) for row in found) / max(sizes[-1], 1))
    same = sum(before == after for before, after in zip(*rows, strict=True))
    return Splitting(sizes[0] / words, sizes[1] / words, same / len(texts), *unknown)


def _check_sizes(model: PreTrainedModel, pieces: Pieces) -> None:
    vocabulary = _count_ids(model)
    if vocabulary is None:
        raise ValueError(f"`model` must read token ids, got {type(model).__name__}, which has no vocabulary.")
    rows = len(model.get_input_embeddings().weight) if not isinstance(model, ManyTasks) else vocabulary
    if rows != vocabulary:
        raise ValueError(
            f"`vocab_size` of the configuration must be that of the word embeddings, {rows}, got {vocabulary}. Use "
            "`resize_token_embeddings`, which sets both."
        )
    tokens = {**pieces.ids, **pieces.added}
    largest = max(tokens.values())
    if largest >= vocabulary or 2 * len(tokens) < vocabulary:
        raise ValueError(
            f"`tokenizer` must be that of the model, but it knows {len(tokens)} tokens up to number {largest}, and "
            f"the model {vocabulary}. Load both from one folder."
        )


def _count_ids(model: PreTrainedModel) -> Any:
    """Return the size of the vocabulary that a model, or that within it, is configured with."""
    nested = name_nested(model)
    return getattr(getattr(model.config, nested) if nested else model.config, "vocab_size", None)


def _check_texts(texts: Iterable[str] | None, keep: Sequence[str | int]) -> list[str]:
    if texts is None:
        if not keep:
            raise ValueError("`texts` or `keep` must be given, got neither. Give texts as the model is used for.")
        return []
    corpus = [] if isinstance(texts, str) else list(texts)  # one text is no list of its characters
    wrong = [text for text in corpus if not isinstance(text, str)]
    if wrong or not any(text.strip() for text in corpus):
        found = repr(texts)[:60] if isinstance(texts, str) else f"{len(corpus)} empty ones"
        found = repr(wrong[0])[:60] if wrong else found
        raise ValueError(
            f"`texts` must be a list of texts, got {found}. Give some thousand of the kind that the model reads."
        )
    return corpus


def _encode(tokenizer: Any, texts: list[str]) -> Iterable[list[int]]:
    """Yield the token ids of texts, without special tokens; nothing is cut off."""
    for start in range(0, len(texts), BATCH):
        batch = texts[start : start + BATCH]
        yield from tokenizer(batch, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]


def _count_tokens(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Counter[int]:
    counts = Counter[int]()
    for ids in _encode(tokenizer, texts):
        counts.update(ids)
    return counts


def _check_language(pieces: Pieces, tokenizer: Any, counts: Counter[int]) -> None:
    """Refuse texts of which the tokenizer knows little, and warn of too few.

    By Good and Turing 1953 the share of tokens that occur once is about that of further tokens that are not seen yet.
    """
    total = sum(counts.values())
    unknown = counts[tokenizer.unk_token_id] + sum(
        count for index, count in counts.items() if "\ufffd" in tokenizer.decode([index])
    )
    if 2 * unknown > total:
        raise ValueError(
            f"`texts` must be in a language of the vocabulary, but {unknown / total:.0%} of their tokens are unknown, "
            "or parts of characters. Give texts that the model can read."
        )
    unseen = sum(count == 1 for count in counts.values()) / total
    if unseen > UNSEEN:
        logger.warning(
            f"`texts` are few: about {unseen:.0%} of the tokens of further ones are not among the {len(counts)} that "
            "they use, and would be split more finely. Give more texts."
        )


def _cover(counts: Counter[int], coverage: float) -> set[int]:
    """Return the most frequent tokens that make up a share of all."""
    wanted, covered, used = coverage * sum(counts.values()), 0, set()
    for index, count in sorted(counts.items(), key=lambda entry: (-entry[1], entry[0])):
        if covered >= wanted:
            break
        used.add(index)
        covered += count
    return used


def _find_ids(pieces: Pieces, keep: Sequence[str | int]) -> set[int]:
    """Return the numbers of the tokens in `keep`."""
    tokens = {**pieces.ids, **pieces.added}
    known, found = set(tokens.values()), set()
    for token in keep:
        index = tokens.get(token) if isinstance(token, str) else token
        if index not in known:
            raise ValueError(
                f"`keep` must be tokens of the vocabulary, or their numbers in [0, {max(known)}], got {token!r}. Find "
                "them by `tokenizer.tokenize`."
            )
        found.add(index)
    return found


def _unknown_words(tokenizer: PreTrainedTokenizerBase, pieces: Pieces, corpus: list[str]) -> set[str]:
    """Return the words of the texts that hold a token that is unknown."""
    words: set[str] = set()
    if pieces.model["type"] == "WordPiece":
        for text, ids in zip(corpus, _encode(tokenizer, corpus), strict=True):
            if tokenizer.unk_token_id in ids:
                words.update(split_into_words(tokenizer, text))
    return words


def _first_position(model: PreTrainedModel) -> int:
    """Return how many tokens must keep their numbers, where positions are counted from that of the padding."""
    tables = [module for name, module in model.named_modules() if name.rpartition(".")[2] in LEARNED]
    return max(
        (table.padding_idx + 1 for table in tables if getattr(table, "padding_idx", None) is not None), default=0
    )


def _edit_ids(fields: dict[str, Any], edit: Callable[[int], int]) -> None:
    """Apply a function to every number of a token that a configuration names, in place, in those within it, too."""
    for name, value in fields.items():
        if isinstance(value, dict):
            _edit_ids(value, edit)
        elif str(name).endswith(("_token_id", "_token_ids", "suppress_tokens", "bad_words_ids", "forced_decoder_ids")):
            fields[name] = _map_ids(value, edit)


def _map_ids(value: Any, edit: Callable[[int], int]) -> Any:
    if isinstance(value, list | tuple):
        return [_map_ids(item, edit) for item in value]
    return edit(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _named_ids(model: PreTrainedModel) -> set[int]:
    """Return the numbers of tokens that the configurations name; those outside of the vocabulary are defaults."""
    found: set[int] = set()

    def note(index: int) -> int:
        found.add(index)
        return index

    for config in [model.config, *([model.generation_config] if model.can_generate() else [])]:
        _edit_ids(config.to_dict(), note)
    return {index for index in found if 0 <= index < _count_ids(model)}


def _check_equal(tokenizer: Any, trimmed: Any, new: dict[int, int], corpus: list[str]) -> None:
    """Refuse a result that splits a text of the corpus otherwise, by the judgement of the tokenizers library."""
    for text, before, after in zip(corpus, _encode(tokenizer, corpus), _encode(trimmed, corpus), strict=True):
        if [new.get(index) for index in before] != after:
            raise ValueError(
                f"`texts` must be split alike by a {type(tokenizer).__name__} with fewer tokens, but {text[:60]!r} is "
                "not. Leave it out, or keep its tokens by `keep`."
            )


@torch.no_grad()
def _trim_rows(model: Any, new: dict[int, int]) -> Any:
    """Copy a model with the rows of the tokens that stay: wherever its shape depends on the size of the vocabulary."""
    training = model.training
    if isinstance(model, ManyTasks):
        tasks = {name: _trim_rows(model.extract_task(name), new) for name in model.tasks}
        return type(model).from_tasks(tasks).train(training)
    whole, rows = _count_ids(model), torch.tensor(list(new), device=model.device)

    def edit(fields: dict[str, Any]) -> None:
        for part in (fields, *(value for value in fields.values() if isinstance(value, dict))):
            if part.get("vocab_size") == whole:
                part["vocab_size"] = len(new)
        _edit_ids(fields, lambda index: new.get(index, index))

    smaller = build_like(model, edit_config(model.config, edit))
    state: dict[str, Tensor] = model.state_dict()
    for name, wanted in smaller.state_dict().items():
        for dim, size in enumerate(wanted.shape if name in state else ()):
            if state[name].shape[dim] == whole and size == len(new):
                state[name] = state[name].index_select(dim, rows)
    fill(smaller, state, model)
    if model.can_generate():
        fields = smaller.generation_config.to_dict()
        _edit_ids(fields, lambda index: new.get(index, index))
        smaller.generation_config = type(smaller.generation_config).from_dict(fields)
    return smaller
