"""Leave pieces of a tokenizer out, in the JSON of the tokenizers library."""

import copy
import json
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PreTrainedTokenizerBase

from .functional_pieces import (
    close_characters,
    close_greedy,
    find_stranded,
    match_greedily,
    merge_path,
)


KINDS = ("WordPiece", "BPE", "Unigram")


def read_json(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return what tokenizer.json holds.

    Raises:
        ValueError: If there is none, or its model has no rule here.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"`tokenizer` must be one of transformers with a tokenizer.json, got {type(tokenizer).__name__}. Load it "
            "by `AutoTokenizer`, and convert one that is of Python alone."
        )
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        data = json.loads(Path(folder, "tokenizer.json").read_text(encoding="utf-8"))
    if data["model"].get("type") not in KINDS:
        raise ValueError(f"`tokenizer` must be one of {', '.join(KINDS)}, got {data['model'].get('type')!r}.")
    if data["model"].get("dropout"):
        raise ValueError(
            f"`tokenizer` must split a text always alike, got a dropout of merges of {data['model']['dropout']}. Set "
            "`tokenizer.backend_tokenizer.model.dropout = None`."
        )
    return data


class Pieces:
    """The vocabulary of a tokenizer.

    Args:
        data: What tokenizer.json holds.

    Attributes:
        ids: Number of each piece of the model, without what was added to it.
        added: Number of each added token; special ones are among them.
    """

    def __init__(self, data: dict[str, Any]) -> None:
        self.data, self.model = data, data["model"]
        vocab = self.model["vocab"]
        self.ids: dict[str, int] = (
            {piece: index for index, (piece, _) in enumerate(vocab)} if isinstance(vocab, list) else dict(vocab)
        )
        self.added: dict[str, int] = {token["content"]: token["id"] for token in data["added_tokens"]}
        self.prefix: str = self.model.get("continuing_subword_prefix") or ""
        self.suffix: str = self.model.get("end_of_word_suffix") or ""

    @property
    def always_kept(self) -> set[int]:
        """Numbers of the tokens that stay whatever the texts are: added ones, and those of templates and padding."""
        unknown = self.model.get("unk_id")
        kept = set(self.added.values()) | set(_ids_in(self.data["post_processor"]))
        kept |= {self.data["padding"]["pad_id"]} if self.data.get("padding") else set()
        kept |= {self.ids[self.model["unk_token"]]} if self.model.get("unk_token") in self.ids else set()
        return kept | (set() if unknown is None else {unknown})

    def close(self, used: Iterable[int]) -> set[int]:
        """Return the numbers of the pieces that stay where some are used, so that no text becomes unencodable."""
        by_id = {index: piece for piece, index in self.ids.items()}
        chosen = {by_id[index] for index in used if index in by_id}
        close = {"WordPiece": self._close_wordpiece, "BPE": self._close_bpe, "Unigram": self._close_unigram}
        return {self.ids[piece] for piece in close[self.model["type"]](chosen)}

    def unknown_paths(self, words: Iterable[str]) -> set[int]:
        """Return the pieces on the way to the dead end of words that WordPiece does not know, so that it stays one."""
        if self.model["type"] != "WordPiece":
            return set()
        found = (match_greedily(word, self.ids, self.prefix) for word in words)
        return {self.ids[piece] for path, is_whole in found if not is_whole for piece in path}

    def _close_wordpiece(self, chosen: set[str]) -> set[str]:
        single = {piece for piece in self.ids if self._is_single(piece)}
        return close_greedy(self.ids, chosen | single | find_stranded(self.ids, single, self.prefix), self.prefix)

    def _close_bpe(self, chosen: set[str]) -> set[str]:
        kept = chosen | {piece for piece in self.ids if self._is_single(piece) or self._is_byte(piece)}
        if self.model.get("ignore_merges"):  # whole words, whatever their characters
            kept |= {piece for piece in self.ids if not set(self._symbols(piece)) <= self.ids.keys()}
        ranks = {pair: rank for rank, pair in enumerate(self.merges)}
        for piece in kept - self.added.keys():
            kept = kept | (merge_path(self._symbols(piece), ranks, self.prefix) & self.ids.keys())
        return kept

    def _close_unigram(self, chosen: set[str]) -> set[str]:
        scores = {piece: score for piece, score in self.model["vocab"] if piece not in self.added}
        single = {piece for piece in scores if len(piece) == 1}
        kept = chosen | single | {piece for piece in self.ids if self._is_byte(piece)}
        stranded = set() if self.model.get("byte_fallback") else find_stranded(scores, single)
        kept |= close_characters(scores, stranded)
        return kept | {min(self.model["vocab"], key=lambda entry: entry[1])[0]}  # that of the unknown piece follows it

    @property
    def merges(self) -> list[tuple[str, str]]:
        """The merges of byte-pair encoding, the first ones first."""
        pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in self.model["merges"])
        return [(first, second) for first, second in pairs]

    def _symbols(self, piece: str) -> list[str]:
        """Split a piece into those that byte-pair encoding starts from."""
        bare = piece.removesuffix(self.suffix) if len(piece) > len(self.suffix) else piece
        inner = bool(self.prefix) and bare.startswith(self.prefix) and len(bare) > len(self.prefix)
        bare = bare[len(self.prefix) :] if inner else bare
        symbols = [(self.prefix if index or inner else "") + character for index, character in enumerate(bare)]
        symbols[-1] += piece[len(piece) - len(self.suffix) :] if piece.endswith(self.suffix) and self.suffix else ""
        return symbols

    def _is_single(self, piece: str) -> bool:
        return len(self._symbols(piece)) == 1

    def _is_byte(self, piece: str) -> bool:
        return bool(self.model.get("byte_fallback")) and len(piece) == 6 and piece.startswith("<0x")


def _ids_in(processor: dict[str, Any] | None) -> Iterator[int]:
    """Yield the numbers of tokens in a post-processor."""
    for holder, key in _places_of_ids(processor):
        yield from holder[key] if isinstance(holder[key], list) else [holder[key]]


def _places_of_ids(processor: dict[str, Any] | None) -> Iterator[tuple[Any, Any]]:
    """Yield where a post-processor holds numbers of tokens, as a container and the key in it."""
    if processor is None:
        return
    for inner in processor.get("processors", []):
        yield from _places_of_ids(inner)
    for token in (processor.get("special_tokens") or {}).values():
        yield token, "ids"
    for name in ("sep", "cls"):
        if name in processor:
            yield processor[name], 1


def renumber(data: dict[str, Any], new: dict[int, int]) -> dict[str, Any]:
    """Return what tokenizer.json holds of the pieces that stay, by their new numbers.

    Args:
        data: What it holds.
        new: New numbers of those that stay, in the old order.
    """
    pieces, data = Pieces(data), copy.deepcopy(data)
    model = data["model"]
    if isinstance(model["vocab"], list):
        model["vocab"] = [entry for index, entry in enumerate(model["vocab"]) if index in new]
    else:
        model["vocab"] = {piece: new[index] for piece, index in pieces.ids.items() if index in new}
    if "merges" in model:
        left, cut = model["vocab"], len(pieces.prefix)
        whole = (pair for pair in pieces.merges if pair[0] in left and pair[1] in left)
        model["merges"] = [[first, second] for first, second in whole if first + second[cut:] in left]
    if model.get("unk_id") is not None:
        model["unk_id"] = new[model["unk_id"]]
    for token in data["added_tokens"]:
        token["id"] = new[token["id"]]
    for holder, key in _places_of_ids(data["post_processor"]):
        old = holder[key]
        holder[key] = [new[index] for index in old] if isinstance(old, list) else new[old]
    if data.get("padding"):
        data["padding"]["pad_id"] = new[data["padding"]["pad_id"]]
    return data


def build_tokenizer(tokenizer: PreTrainedTokenizerBase, data: dict[str, Any]) -> PreTrainedTokenizerBase:
    """Build a tokenizer of the same class, with the same settings, as its class reads it from a folder.

    Raises:
        ValueError: If the class makes another vocabulary of the file.
    """
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        Path(folder, "tokenizer.json").write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
        built = type(tokenizer).from_pretrained(folder, local_files_only=True)
    built.name_or_path = tokenizer.name_or_path
    pieces = Pieces(data)
    if built.get_vocab() != pieces.ids | pieces.added:
        raise ValueError(
            f"`tokenizer` must take its vocabulary from tokenizer.json, which a {type(tokenizer).__name__} does not "
            "do alone. Load it as a `transformers.PreTrainedTokenizerFast`."
        )
    return built


def split_into_words(tokenizer: Any, text: str) -> Collection[str]:
    """Return the words of a text as the model of a tokenizer is given them."""
    backend = tokenizer.backend_tokenizer
    text = backend.normalizer.normalize_str(text) if backend.normalizer is not None else text
    if backend.pre_tokenizer is None:
        return [text]
    return {word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)}
