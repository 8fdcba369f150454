"""Words and their tags stay together, whatever the tokenizer does to the words."""

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertTokenizer, PreTrainedTokenizerFast

from hf_moebert.data import encode_tokens, load_splits, tag_names_of


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "new", "york", "is", "big", "##ger", "##gest", "."]
CLS, SEP, UNK = 2, 3, 1
NAMES = ["O", "B-city", "I-city"]


@pytest.fixture(scope="module")
def tokenizer():
    return BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)})


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def encode(tokenizer, words, tags, *, names=NAMES, **options):
    dataset = Dataset.from_dict({"tokens": [words], "tags": [tags]})
    return encode_tokens(dataset, tokenizer, tag_names=names, **options)[0]


def test_words_of_one_piece_keep_their_tags(tokenizer):
    dataset = Dataset.from_dict({"id": [7], "tokens": [["New", "York", "is"]], "tags": [["B-city", "I-city", "O"]]})
    assert encode_tokens(dataset, tokenizer, tag_names=NAMES).to_dict() == {
        "input_ids": [[CLS, 5, 6, 7, SEP]],
        "token_type_ids": [[0] * 5],
        "attention_mask": [[1] * 5],
        "labels": [[-100, 1, 2, 0, -100]],
    }


def test_only_the_first_piece_of_a_word_has_a_label(tokenizer):
    row = encode(tokenizer, ["bigger", "york", "biggest."], ["O", "B-city", "I-city"])
    assert row["input_ids"] == [CLS, 8, 9, 6, 8, 10, 11, SEP]
    assert row["labels"] == [-100, 0, -100, 1, 2, -100, -100, -100]


@pytest.mark.parametrize("nothing", ["", " ", "\u200b", "\u200d\u200b", "\x07", "\u00ad", "\ufeff"])
def test_a_word_that_leaves_nothing_shifts_no_tag(tokenizer, nothing):
    row = encode(tokenizer, ["is", nothing, "york", nothing], ["O", "B-city", "I-city", "O"])
    assert [label for label in row["labels"] if label != -100] == [0, 1, 2, 0]
    assert row["input_ids"] == [CLS, 7, UNK, 6, UNK, SEP]


def test_without_an_unknown_token_such_a_word_is_left_out(tokenizer):
    pieces = Tokenizer(models.WordLevel({"new": 0, "york": 1}))
    pieces.pre_tokenizer = pre_tokenizers.Whitespace()
    row = encode(PreTrainedTokenizerFast(tokenizer_object=pieces), ["new", " ", "york"], ["O", "B-city", "I-city"])
    assert (row["input_ids"], row["labels"]) == ([0, 1], [0, 2])


def test_sentences_may_be_empty(tokenizer):
    dataset = Dataset.from_dict({"tokens": [[], ["is"], []], "tags": [[], ["O"], []]})
    encoded = encode_tokens(dataset, tokenizer, tag_names=NAMES)
    assert encoded["input_ids"][:] == [[CLS, SEP], [CLS, 7, SEP], [CLS, SEP]]
    assert encoded["labels"][:] == [[-100] * 2, [-100, 0, -100], [-100] * 2]
    alone = encode_tokens(dataset.select([0]), tokenizer, tag_names=NAMES)
    assert alone["labels"][:] == [[-100] * 2]
    untyped = Dataset.from_dict({"tokens": [[]], "tags": [[]]})
    assert encode_tokens(untyped, tokenizer, tag_names=NAMES)["labels"][:] == [[-100] * 2]


@pytest.mark.parametrize(("max_length", "words"), [(3, 0), (4, 1), (5, 2), (6, 2), (7, 2), (8, 3), (9, 4), (10, 5)])
def test_a_cut_keeps_whole_words(tokenizer, max_length, words):
    # of 2, 1, 3, 1 and 1 tokens, and two special ones
    row = encode(
        tokenizer, ["bigger", "is", "biggest.", "is", "is"], ["O", "O", "O", "B-city", "B-city"], max_length=max_length
    )
    assert len(row["input_ids"]) <= max_length
    assert (row["input_ids"][0], row["input_ids"][-1]) == (CLS, SEP)
    assert sum(label != -100 for label in row["labels"]) == words
    assert len(row["labels"]) == len(row["input_ids"]) == len(row["attention_mask"])


ENTITY = {
    "IOB2": ["O", "B-a", "I-a", "I-a", "O"],
    "IOBES": ["O", "B-a", "I-a", "E-a", "S-a"],
    "BILOU": ["O", "B-a", "I-a", "L-a", "U-a"],
    "IOB1": ["O", "I-a", "I-a", "I-a", "O"],
    "bare": ["O", "B", "I", "E", "O"],
}


@pytest.mark.parametrize("scheme", ENTITY)
def test_a_cut_goes_around_an_entity(tokenizer, scheme):
    tags = ENTITY[scheme]
    for room, words in enumerate([0, 1, 1, 1, 4, 5]):
        if room:
            row = encode(tokenizer, ["is"] * 5, tags, names=list(dict.fromkeys(tags)), max_length=room + 2)
            assert sum(label != -100 for label in row["labels"]) == words


def test_neighbours_may_be_parted(tokenizer):
    for tags in (["B-a", "B-a"], ["B-a", "I-b"], ["S-a", "S-a"], ["E-a", "B-a"], ["U-a", "U-a"], ["NOUN", "VERB"]):
        row = encode(tokenizer, ["is", "is"], tags, names=sorted(set(tags)), max_length=3)
        assert sum(label != -100 for label in row["labels"]) == 1, tags


def test_an_entity_that_never_fits_leaves_no_words(tokenizer):
    row = encode(tokenizer, ["is"] * 3, ["B-city", "I-city", "I-city"], max_length=4)
    assert (row["input_ids"], row["labels"]) == ([CLS, SEP], [-100, -100])


def test_every_word_of_random_sentences_keeps_its_tag(tokenizer):
    generator = np.random.default_rng(0)
    pieces = {"new": 1, "bigger": 2, "biggest.": 3, "\u200b": 1, "?": 1}
    sentences = [generator.choice(list(pieces), size=generator.integers(12)).tolist() for _ in range(50)]
    numbers = [generator.integers(3, size=len(words)).tolist() for words in sentences]
    tags = [[NAMES[n] for n in row] for row in numbers]
    found = encode_tokens(Dataset.from_dict({"tokens": sentences, "tags": tags}), tokenizer, tag_names=NAMES)
    for words, row, labels in zip(sentences, numbers, found["labels"], strict=True):
        expected = [-100]
        for word, n in zip(words, row, strict=True):
            expected += [n] + [-100] * (pieces[word] - 1)
        assert labels == [*expected, -100]


def test_tags_are_names_classes_or_indices(tokenizer):
    words, names = [["new", "york"]], ["O", "I-city", "B-city"]
    classes = Features({"tokens": List(Value("string")), "tags": List(ClassLabel(names=NAMES))})
    for dataset, expected in (
        (Dataset.from_dict({"tokens": words, "tags": [["B-city", "I-city"]]}), [2, 1]),
        (Dataset.from_dict({"tokens": words, "tags": [[1, 2]]}, features=classes), [2, 1]),
        (Dataset.from_dict({"tokens": words, "tags": [[1, 2]]}), [1, 2]),
    ):
        assert encode_tokens(dataset, tokenizer, tag_names=names)["labels"][0] == [-100, *expected, -100]


def test_all_splits_are_encoded_alike(tokenizer):
    part = Dataset.from_dict({"words": [["new", "york"]], "ner": [["B-city", "I-city"]]})
    options = {"tokens_column": "words", "tags_column": "ner", "tag_names": NAMES, "max_length": 3}
    encoded = encode_tokens(DatasetDict(train=part, validation=part), tokenizer, **options)
    assert isinstance(encoded, DatasetDict)
    assert encoded["validation"].to_dict() == encode_tokens(part, tokenizer, **options).to_dict()


def test_tagged_words_are_read_from_a_file(tokenizer, tmp_path):
    rows = {"tokens": [["new", "york"], ["is"], []], "tags": [["B-city", "I-city"], ["O"], []]}
    Dataset.from_dict(rows).to_json(tmp_path / "train.jsonl")
    splits = load_splits(train_file=tmp_path / "train.jsonl", validation_file=tmp_path / "train.jsonl")
    assert tag_names_of(splits["train"]) == NAMES
    assert encode_tokens(splits, tokenizer, tag_names=NAMES)["validation"]["labels"][1] == [-100, 0, -100]


def test_tag_names_are_sorted_by_type_with_o_first():
    tags = [["I-b", "B-b", "O"], ["I-a-c", "B-a-c"], ["S-a", "E-a"], []]
    assert tag_names_of(Dataset.from_dict({"tags": tags})) == ["O", "E-a", "S-a", "B-a-c", "I-a-c", "B-b", "I-b"]
    assert tag_names_of(Dataset.from_dict({"pos": [["VERB", "NOUN"]]}), "pos") == ["NOUN", "VERB"]


def test_tag_names_of_classes_keep_their_order():
    features = Features({"tags": List(ClassLabel(names=["B-z", "O", "unseen"]))})
    assert tag_names_of(Dataset.from_dict({"tags": [[1, 0]]}, features=features)) == ["B-z", "O", "unseen"]


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ({"words": [["a"]]}, "must have the column 'tags', it has words"),
        ({"tags": ["O O"]}, "'tags' must hold lists, got string. Split"),
        ({"tags": [[0, 1]]}, "'tags' must hold lists of tag names, got lists of int64. Name the tags yourself"),
        ({"tags": [[["O"]]]}, "'tags' must hold lists of tag names, got lists of list"),
    ],
)
def test_names_of_what_is_no_tags_are_refused(column, message):
    with pytest.raises(ValueError, match=message):
        tag_names_of(Dataset.from_dict(column))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"words": [["is"]], "tags": [["O"]]}, "must have the column 'tokens', it has words, tags"),
        ({"tokens": ["is"], "tags": [["O"]]}, "'tokens' must hold lists, got string"),
        ({"tokens": [[1]], "tags": [["O"]]}, "'tokens' must hold lists of words, got lists of int64"),
        ({"tokens": [["is"]], "tags": ["O"]}, "'tags' must hold lists, got string"),
        ({"tokens": [["is"], ["is", "is"]], "tags": [["O"], ["O"]]}, "row 1 has 2 words in 'tokens' and 1 tags"),
        ({"tokens": [["is"], None], "tags": [["O"], ["O"]]}, r"row 1 has None and \['O'\]. Drop such rows"),
        ({"tokens": [["is", None]], "tags": [["O", "O"]]}, r"row 0 has \['is', None\]"),
        ({"tokens": [["is"]] * 2, "tags": [None, ["O"]]}, r"row 0 has \['is'\] and None"),
        ({"tokens": [["is"], ["is"]], "tags": [["O"], ["B-x"]]}, r"must be in \['O', .*\], got 'B-x' in row 1"),
        ({"tokens": [["is"]], "tags": [[3]]}, "got 3 in row 0"),
        ({"tokens": [["is"]], "tags": [[-1]]}, "got -1 in row 0"),
        ({"tokens": [["is", "is"]], "tags": [["O", None]]}, "got None in row 0"),
        ({"tokens": [], "tags": []}, "must hold lists, got null"),
    ],
)
def test_words_and_tags_that_do_not_pair_up_are_refused(tokenizer, columns, message):
    with pytest.raises(ValueError, match=message):
        encode_tokens(Dataset.from_dict(columns), tokenizer, tag_names=NAMES)


def test_no_rows_no_room_and_slow_tokenizers_are_refused(tokenizer, monkeypatch):
    dataset = Dataset.from_dict({"tokens": [["is"]], "tags": [["O"]]})
    with pytest.raises(ValueError, match="at least one example, got none"):
        encode_tokens(dataset.select([]), tokenizer, tag_names=NAMES)
    with pytest.raises(ValueError, match="`max_length` must be above the 2 special tokens, got 2. Use 128"):
        encode_tokens(dataset, tokenizer, tag_names=NAMES, max_length=2)
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    with pytest.raises(ValueError, match="`tokenizer` must be a fast one, .* got BertTokenizer"):
        encode_tokens(dataset, tokenizer, tag_names=NAMES)
