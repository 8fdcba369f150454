import json

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from transformers import BertTokenizer

from hf_moebert.data import encode_text, label_names_of, load_splits


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "null"]


@pytest.fixture
def tokenizer():
    return BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)})


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def rows(size=40):
    return {
        "text": [f"film {i}" for i in range(size)],
        "label": ["good" if i % 4 else "bad" for i in range(size)],
    }


def write(path, columns):
    dataset = Dataset.from_dict(columns)
    if path.suffix in (".csv", ".tsv"):
        dataset.to_csv(path, sep="\t" if path.suffix == ".tsv" else ",", index=False)
    elif path.suffix == ".json":
        path.write_text(json.dumps(dataset.to_list()))
    elif path.suffix == ".jsonl":
        dataset.to_json(path)
    else:
        dataset.to_parquet(path)
    return path


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".csv", ".tsv", ".parquet"])
def test_files_of_every_kind_give_back_what_was_written(tmp_path, ending):
    train = write(tmp_path / f"train{ending}", rows(6))
    validation = write(tmp_path / f"validation{ending}", rows(3))
    splits = load_splits(train_file=train, validation_file=str(validation))
    assert {name: split.to_dict() for name, split in splits.items()} == {"train": rows(6), "validation": rows(3)}


def test_a_file_name_is_taken_literally(tmp_path):
    train = write(tmp_path / "train[1]*.csv", rows(4))
    write(tmp_path / "train1.csv", rows(8))
    assert sum(load_splits(train_file=train).num_rows.values()) == 4


def test_the_word_null_is_a_text_like_any_other(tmp_path):
    columns = {"text": ["null", "NA", "None", "good"], "label": [0, 1, 0, 1]}
    splits = load_splits(train_file=write(tmp_path / "train.csv", columns))
    assert sorted(splits["train"]["text"][:] + splits["validation"]["text"][:]) == sorted(columns["text"])
    assert splits["train"].features["label"].dtype == "int64"


def test_validation_is_read_with_the_types_of_training(tmp_path):
    train = write(tmp_path / "train.csv", {"text": ["x", "y"], "label": [0.5, 2.0]})
    validation = write(tmp_path / "validation.jsonl", {"label": [1, 2], "text": ["x", "y"]})
    splits = load_splits(train_file=train, validation_file=validation)
    assert splits["validation"].features == splits["train"].features
    assert splits["validation"]["label"][:] == [1.0, 2.0]


@pytest.mark.parametrize("labels", ["strings", "integers", "floats", "holes", "lists"])
def test_held_out_examples_partition_the_file_and_depend_on_the_seed_only(tmp_path, labels):
    columns = (
        rows(40)
        | {
            "strings": {},
            "integers": {"label": list(range(8)) * 5},
            "floats": {"label": [i / 10 for i in range(40)]},
            "holes": {"label": ["a", None] * 20},
            "lists": {"label": [[0, 1], [1]] * 20},
        }[labels]
    )
    train = write(tmp_path / "train.jsonl", columns)
    first, again, other = (load_splits(train_file=train, validation_share=0.2, seed=seed) for seed in (0, 0, 1))
    assert first["validation"].to_dict() == again["validation"].to_dict() != other["validation"].to_dict()
    assert first.num_rows == {"train": 32, "validation": 8}
    assert sorted(first["train"]["text"][:] + first["validation"]["text"][:]) == sorted(columns["text"])


@pytest.mark.parametrize("seed", range(5))
def test_every_label_is_held_out_in_its_share(tmp_path, seed):
    labels = ["a"] * 60 + ["b"] * 30 + ["c"] * 10
    train = write(tmp_path / "train.csv", {"text": [f"t{i}" for i in range(100)], "kind": labels})
    held_out = load_splits(train_file=train, validation_share=0.1, label_column="kind", seed=seed)["validation"]
    assert [held_out["kind"][:].count(label) for label in "abc"] == [6, 3, 1]


def test_the_share_is_rounded_but_never_empties_a_split(tmp_path):
    train = write(tmp_path / "train.csv", rows(3))
    assert load_splits(train_file=train, validation_share=0.01).num_rows == {"train": 2, "validation": 1}
    assert load_splits(train_file=train, validation_share=0.99).num_rows == {"train": 1, "validation": 2}


def test_a_folder_keeps_its_validation_split_and_drops_others(tmp_path):
    for split, size in (("train", 5), ("validation", 2), ("test", 3)):
        write(tmp_path / "data" / f"{split}.parquet", rows(size))
    assert load_splits(dataset_name=str(tmp_path / "data")).num_rows == {"train": 5, "validation": 2}


def test_a_folder_without_validation_is_split(tmp_path):
    write(tmp_path / "data" / "train.parquet", rows(10))
    assert load_splits(dataset_name=str(tmp_path / "data")).num_rows == {"train": 9, "validation": 1}


@pytest.fixture
def refused(tmp_path):
    write(tmp_path / "train.csv", rows(4))
    write(tmp_path / "one.csv", rows(1))
    write(tmp_path / "other.csv", {"text": ["x"], "stars": [1]})
    write(tmp_path / "data" / "test.parquet", rows(4))
    (tmp_path / "data.pkl").write_bytes(b"")
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "ragged.jsonl").write_text('{"text": "x"}\n{"text": ')
    return tmp_path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "Exactly one of `dataset_name` and `train_file`"),
        ({"dataset_name": "glue", "train_file": "train.csv"}, "Exactly one of `dataset_name` and `train_file`"),
        ({"dataset_name": "glue", "validation_file": "train.csv"}, "must come with `train_file`"),
        ({"dataset_name": "data"}, "must have a split 'train', .* has test"),
        ({"train_file": "train.csv", "validation_share": 1.0}, r"must be in \(0, 1\), got 1.0"),
        ({"train_file": "data.pkl"}, r"`train_file` must end in .json, .* got '.*data.pkl'. Convert"),
        ({"train_file": "train"}, "`train_file` must end in"),
        ({"train_file": "absent.csv"}, "`train_file` must be an existing file, got .*absent.csv"),
        ({"train_file": "train.csv", "validation_file": "absent.csv"}, "`validation_file` must be an existing file"),
        ({"train_file": "empty.csv"}, "empty.csv' cannot be read"),
        ({"train_file": "ragged.jsonl"}, "ragged.jsonl' cannot be read"),
        ({"train_file": "one.csv"}, "at least 2 examples to hold some out, got 1"),
        ({"train_file": "train.csv", "validation_file": "other.csv"}, r"same columns, got \['text', 'label'\]"),
    ],
)
def test_sources_that_cannot_be_split_are_refused(refused, monkeypatch, options, message):
    monkeypatch.chdir(refused)
    with pytest.raises(ValueError, match=message):
        load_splits(**options)


def test_texts_become_ids_masks_and_labels(tokenizer):
    dataset = Dataset.from_dict({"text": ["good film", "bad"], "label": [1, 0], "idx": [7, 8]})
    assert encode_text(dataset, tokenizer).to_dict() == {
        "input_ids": [[2, 5, 7, 3], [2, 6, 3]],
        "token_type_ids": [[0] * 4, [0] * 3],
        "attention_mask": [[1] * 4, [1] * 3],
        "labels": [1, 0],
    }


def test_pairs_are_joined_and_cut(tokenizer):
    dataset = Dataset.from_dict({"a": ["good good good"], "b": ["bad bad bad"], "y": [0]})
    options = {"text_column": "a", "text_pair_column": "b", "label_column": "y"}
    encoded = encode_text(dataset, tokenizer, max_length=7, **options)
    assert encoded["input_ids"][0] == [2, 5, 5, 3, 6, 6, 3]
    assert encoded["token_type_ids"][0] == [0, 0, 0, 0, 1, 1, 1]


def test_all_splits_are_encoded_alike(tokenizer):
    splits = DatasetDict(train=Dataset.from_dict(rows(5)), validation=Dataset.from_dict(rows(3)))
    encoded = encode_text(splits, tokenizer, label_names=["good", "bad"])
    assert isinstance(encoded, DatasetDict)
    for name, split in splits.items():
        assert encoded[name].to_dict() == encode_text(split, tokenizer, label_names=["good", "bad"]).to_dict()


def test_the_column_labels_may_be_the_source(tokenizer):
    dataset = Dataset.from_dict({"text": ["good", "bad"], "labels": ["yes", "no"]})
    assert encode_text(dataset, tokenizer, label_column="labels", label_names=["no", "yes"])["labels"][:] == [1, 0]


NAMED = Features({"text": Value("string"), "label": ClassLabel(names=["neg", "pos"])})


@pytest.mark.parametrize(
    ("labels", "names", "expected"),
    [
        (["pos", "neg", "pos"], ["neg", "pos"], [1, 0, 1]),
        ([2, 0, 5], None, [2, 0, 5]),
        ([2, 0, 5], ["0", "2", "5"], [1, 0, 2]),
        ([-1, 1, -1], ["-1", "1"], [0, 1, 0]),
        ([0, 1, 0], ["neg", "pos"], [0, 1, 0]),
        ([True, False, True], None, [1, 0, 1]),
        ([True, False, True], ["False", "True"], [1, 0, 1]),
        ([0.5, -1.0, 2.0], None, [0.5, -1.0, 2.0]),
    ],
)
def test_labels_are_numbered_by_name(tokenizer, labels, names, expected):
    dataset = Dataset.from_dict({"text": ["good"] * 3, "label": labels})
    encoded = encode_text(dataset, tokenizer, label_names=names)["labels"][:]
    assert encoded == expected
    assert {type(value) for value in encoded} == {type(expected[0])}


@pytest.mark.parametrize(("names", "expected"), [(None, [0, 1]), (["pos", "neg"], [1, 0])])
def test_class_labels_follow_the_order_of_the_names_asked_for(tokenizer, names, expected):
    dataset = Dataset.from_dict({"text": ["bad", "good"], "label": [0, 1]}, features=NAMED)
    assert encode_text(dataset, tokenizer, label_names=names)["labels"][:] == expected


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"body": ["x"], "label": [0]}, {}, "must have the column 'text', it has body, label"),
        ({"text": ["x"], "label": [0]}, {"text_pair_column": "b"}, "must have the column 'b', it has text, label"),
        ({"text": ["x"], "y": [0]}, {}, "must have the column 'label', it has text, y"),
        ({"text": [], "label": []}, {}, "at least one example, got none"),
        ({"text": [1], "label": [0]}, {}, "'text' must hold texts, got int64"),
        ({"text": ["x", None], "label": [0, 1]}, {}, "'text' must hold texts, row 1 has none"),
        ({"text": ["x"], "label": ["a"]}, {}, "`label_names` must be given .* Use `label_names_of`"),
        ({"text": ["x"], "label": ["c"]}, {"label_names": ["a", "b"]}, r"must be in \['a', 'b'\], got \['c'\]"),
        ({"text": ["x"] * 2, "label": ["a", None]}, {"label_names": ["a"]}, r"must be in \['a'\], got \['None'\]"),
        ({"text": ["x"], "label": [-1]}, {}, r"must be whole numbers from 0, got \['-1'\]"),
        ({"text": ["x"], "label": [2]}, {"label_names": ["a", "b"]}, r"got \['2'\]"),
        ({"text": ["x"], "label": [3]}, {"label_names": ["1", "2"]}, r"got \['3'\]"),
        ({"text": ["x"], "label": [0.5]}, {"label_names": ["a"]}, "must be None for a regression"),
        ({"text": ["x"] * 2, "label": [0.5, None]}, {}, "must hold finite numbers"),
        ({"text": ["x"], "label": [float("nan")]}, {}, "must hold finite numbers"),
        ({"text": ["x"], "label": [[0, 1]]}, {}, "must hold one label per example, got list"),
    ],
)
def test_examples_that_cannot_be_encoded_are_refused(tokenizer, columns, options, message):
    with pytest.raises(ValueError, match=message):
        encode_text(Dataset.from_dict(columns), tokenizer, **options)


def test_hidden_test_labels_of_a_benchmark_are_refused(tokenizer):
    dataset = Dataset.from_dict({"text": ["good"], "label": [-1]}, features=NAMED)
    with pytest.raises(ValueError, match=r"labels in 'label' must be whole numbers from 0, got \['-1'\]"):
        encode_text(dataset, tokenizer)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["pos", "neg", "pos"], ["neg", "pos"]),
        (["b", None, "a"], ["a", "b"]),
        ([10, 2, 1, 2], ["1", "2", "10"]),
        ([True, False], ["False", "True"]),
        ([0.5, 1.0], None),
    ],
)
def test_label_names_are_sorted_values(labels, expected):
    assert label_names_of(Dataset.from_dict({"y": labels}), "y") == expected


def test_label_names_of_class_labels_keep_their_order():
    features = Features({"label": ClassLabel(names=["z", "a", "unseen"])})
    assert label_names_of(Dataset.from_dict({"label": [1, 0]}, features=features)) == ["z", "a", "unseen"]


def test_label_names_of_nothing_are_refused():
    with pytest.raises(ValueError, match="must have the column 'label', it has text"):
        label_names_of(Dataset.from_dict({"text": ["x"]}))
    with pytest.raises(ValueError, match="must hold one label per example, got null"):
        label_names_of(Dataset.from_dict({"label": [None]}))


def test_names_found_number_the_labels_they_came_from(tokenizer):
    labels = np.random.default_rng(0).choice([3, 1, 20], size=30).tolist()
    dataset = Dataset.from_dict({"text": ["film"] * 30, "label": labels})
    names = label_names_of(dataset)
    encoded = encode_text(dataset, tokenizer, label_names=names)["labels"][:]
    assert [int(names[i]) for i in encoded] == labels
