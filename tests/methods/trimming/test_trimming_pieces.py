"""What a smaller vocabulary must keep, against brute force and the tokenizers library."""

import json
from functools import cache
from itertools import product

import pytest
from hypothesis import given, settings, strategies as st
from tiny_tokenizers import KINDS, SCRIPTS, make_texts, make_tokenizer
from transformers import BertConfig, BertModel

from hf_moebert.methods.trimming import trim_vocabulary
from hf_moebert.methods.trimming.functional_pieces import (
    close_characters,
    close_greedy,
    find_stranded,
    match_greedily,
    merge_path,
    single_pieces,
)


WORDS = ["".join(letters) for size in range(1, 7) for letters in product("ab", repeat=size)]
PIECES = [*WORDS[:14], *(f"##{word}" for word in WORDS[:30])]


@cache
def make_pair(kind):
    """A tokenizer, and what is left of it for texts of three scripts, most of them Latin."""
    tokenizer = make_tokenizer(kind)
    sizes = {"num_hidden_layers": 1, "hidden_size": 4, "num_attention_heads": 1, "intermediate_size": 4}
    model = BertModel(BertConfig(vocab_size=len(tokenizer), **sizes))
    return tokenizer, trim_vocabulary(model, tokenizer, make_texts(30, 1, MOSTLY_LATIN))[1]


@pytest.mark.parametrize("kind", KINDS)
def test_texts_of_the_corpus_are_split_alike(kind):
    tokenizer, trimmed = make_pair(kind)
    assert len(trimmed) < len(tokenizer)
    for text in [*make_texts(30, 1, MOSTLY_LATIN), "zzz a<mask>"]:
        assert trimmed(text, text).tokens() == tokenizer(text, text).tokens()


MOSTLY_LATIN = [*SCRIPTS[:1] * 7, *SCRIPTS[1:3]]
LETTERS = [*"".join(SCRIPTS), *" <>|ŉﬁ\u0301\u200d"]
any_text = st.text(st.sampled_from(LETTERS) | st.characters(codec="utf-8"), max_size=12)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(text=any_text)
def test_nothing_becomes_unencodable(kind, text):
    tokenizer, trimmed = make_pair(kind)
    before, after = (one.backend_tokenizer.encode(text, add_special_tokens=False) for one in (tokenizer, trimmed))
    assert after.tokens.count("<unk>") <= before.tokens.count("<unk>")
    if tokenizer.backend_tokenizer.decoder is not None and "<unk>" not in before.tokens:
        assert trimmed.decode(after.ids) == tokenizer.decode(before.ids)
    covered = [{place for start, end in one.offsets for place in range(start, end)} for one in (before, after)]
    assert covered[0] == covered[1]


@settings(max_examples=60, deadline=None)
@given(pieces=st.sets(st.sampled_from(PIECES), min_size=3, max_size=16), data=st.data())
def test_no_longest_match_runs_into_a_dead_end(pieces, data):
    single = {piece for piece in pieces if single_pieces(piece, "##") == {piece}}
    chosen = data.draw(st.sets(st.sampled_from(sorted(pieces))))
    kept = close_greedy(pieces, chosen | single | find_stranded(pieces, single, "##"), "##")
    assert chosen <= kept <= pieces
    for word in WORDS:
        assert match_greedily(word, kept, "##")[1] or not match_greedily(word, pieces, "##")[1]


def test_pieces_from_within_which_a_match_could_go_astray_stay():
    # Without "ab", the match is "a", then "##bc" reaches into "##cd", and no piece begins with "d".
    pieces = {"a", "##b", "##c", "ab", "##bc", "##cd"}
    kept = {"a", "##b", "##c", "##bc", "##cd"}
    assert match_greedily("abcd", pieces, "##") == (["ab", "##cd"], True)
    assert match_greedily("abcd", kept, "##") == (["a", "##bc"], False)
    assert close_greedy(pieces, kept, "##") == pieces
    assert close_greedy(pieces - {"##bc"}, kept - {"##bc"}, "##") == kept - {"##bc"}


def test_merges_are_followed_by_their_rank():
    ranks = {("b", "c"): 0, ("a", "b"): 1, ("a", "bc"): 2, ("bc", "bc"): 3}
    assert merge_path(list("abcbc"), ranks) == {"a", "b", "c", "bc", "bcbc"} - {"bcbc"} | {"abc"}
    assert merge_path(list("aaa"), {("a", "a"): 0}) == {"a", "aa"}
    assert merge_path(["a", "##b"], {("a", "##b"): 0}, "##") == {"a", "##b", "ab"}


def test_characters_that_stand_beside_stranded_ones_keep_their_pieces():
    pieces = {"a", "b", "ab", "bX", "c", "cd", "d", "ac"}
    assert find_stranded(pieces, {"a", "b", "c", "d"}) == {"bX"}
    assert close_characters(pieces, {"bX"}) == pieces
    assert close_characters(pieces - {"ac"}, {"bX"}) == {"a", "b", "ab", "bX"}
    assert close_characters(pieces, set()) == set()


def test_the_score_of_the_unknown_piece_stays():
    lowest = [
        min(score for _, score in json.loads(x.backend_tokenizer.to_str())["model"]["vocab"])
        for x in make_pair("Unigram")
    ]
    assert lowest[0] == lowest[1]
