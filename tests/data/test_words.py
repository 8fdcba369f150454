"""The words of a text are those of the list that was joined to it."""

import pytest
from hypothesis import given, strategies as st

from hf_moebert.data.words import IDEOGRAPHS, find_words, has_sure_words


def words_of(text):
    return [text[start:end] for start, end in find_words(text)]


@given(st.text(max_size=60))
def test_words_are_what_blanks_separate_and_chinese_characters(text):
    words = words_of(text)
    assert "".join(words) == "".join(text.split())
    assert all(word.split() == [word] for word in words)
    assert all(len(word) == 1 or not any(word_is_chinese(character) for character in word) for word in words)
    assert words_of(" ".join(words)) == words


def word_is_chinese(character):
    return any(ord(low) <= ord(character) <= ord(high) for low, high in ranges())


def ranges():
    parts = IDEOGRAPHS.split("-")
    return zip([parts[0], *(part[1] for part in parts[1:-1])], [*(part[0] for part in parts[1:])], strict=True)


@given(st.lists(st.text(st.characters(categories=["L", "P", "S", "M"]), min_size=1, max_size=5), max_size=8))
def test_words_joined_by_blanks_are_found(words):
    words = [word for word in words if not any(map(word_is_chinese, word))]
    assert words_of(" ".join(words)) == words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", []),
        (" \n", []),
        ("我在北京,OK", ["我", "在", "北", "京", ",OK"]),
        ("서울에 산다", ["서울에", "산다"]),
        ("a\u200bb c", ["a\u200bb", "c"]),
        ("@user U.S. 👩\u200d🔬", ["@user", "U.S.", "👩\u200d🔬"]),
    ],
)
def test_examples(text, words):
    assert words_of(text) == words


@pytest.mark.parametrize(
    ("sure", "text"),
    [
        *((True, text) for text in ("", "the London .", "北京 the", "सड़क London", "한국 and", "سلام", "a 1 é", "# !")),
        *(
            (False, text)
            for text in ("London.", "@user", "don't", "ไทย", "ひら", "カナ", "...", "a\u200bb", "1963年", "北京ok")
        ),
    ],
)
def test_words_are_sure_where_nobody_would_divide_them(sure, text):
    assert has_sure_words(text) == sure
