# Copied from hf_moebert/data/words.py by `make copies`; edit there.
"""The words of a text, as lists of tagged words have them."""

import re
import unicodedata
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase


# Chinese characters are words of their own in lists of tagged words, and for BERT's tokenizers.
IDEOGRAPHS = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
WORD = re.compile(rf"[{IDEOGRAPHS}]|[^\s{IDEOGRAPHS}]+")
BESIDE = re.compile(rf"[{IDEOGRAPHS}][^\s{IDEOGRAPHS}]{{2}}|[^\s{IDEOGRAPHS}]{{2}}[{IDEOGRAPHS}]")
# Thai to Myanmar, Khmer, kana, halfwidth kana: several letters in a row may be several words
UNDIVIDED = re.compile(r"[\u0e00-\u109f\u1780-\u17ff\u3041-\u30ff\uff66-\uff9f]{2}")


def find_words(text: str) -> list[tuple[int, int]]:
    """Find the words of a text: what blanks separate, and each Chinese character.

    They are those of the list that was joined to the text, by blanks or, if of Chinese characters, by nothing.
    Punctuation stays with the word that it touches. Our own design.

    Returns:
        The first character of each word, and that after its last.
    """
    return [found.span() for found in WORD.finditer(text)]


def has_sure_words(text: str) -> bool:
    """Check whether any other way to divide a text would find the words of `find_words`.

    It may not where punctuation touches letters ("London."), where letters are of a script without blanks, and where
    letters or digits touch Chinese characters: lists of characters divide them, too.
    """
    words = (text[start:end] for start, end in find_words(text))
    if UNDIVIDED.search(text) or BESIDE.search(text):
        return False
    return all(len(word) == 1 or set(map(_kind, word)) <= set("LMN") for word in words)


def _kind(character: str) -> str:
    """Return "L" for a letter, "M" for a mark on one, "N" for a digit, "P" for punctuation, "S" for a symbol."""
    return unicodedata.category(character)[0]


def keep_words(
    tokenizer: "PreTrainedTokenizerBase", sentences: list[list[str]], encoded: "BatchEncoding"
) -> list[list[str]]:
    """Put the unknown token in place of words that a tokenizer dropped, such as a lone control character.

    Args:
        tokenizer: Fast tokenizer.
        sentences: Lists of words.
        encoded: What the tokenizer made of them, not truncated.
    """
    left = [set(encoded.word_ids(row)) for row in range(len(sentences))]
    return [
        [word if number in seen else tokenizer.unk_token or word for number, word in enumerate(words)]
        for words, seen in zip(sentences, left, strict=True)
    ]
