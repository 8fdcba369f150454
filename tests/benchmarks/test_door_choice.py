"""The check of a search: all that it could have chosen, trained to the end."""

import itertools

from datasets import Dataset
from door_choice import check_choice, count_steps
from tiny_classifiers import WORDS, save_classifier

from hf_moebert.compress import searching
from hf_moebert.compress.recipe_file import parse_recipe
from hf_moebert.compress.result import read_result
from hf_moebert.measuring.comparison import TextColumns


def test_the_choice_is_compared_with_all_that_was_not_chosen(tmp_path, monkeypatch):
    some = {name: searching.STRUCTURES[name] for name in ("as it is", "half of the layers", "pruned to 50 %")}
    monkeypatch.setattr(searching, "STRUCTURES", some)
    monkeypatch.setattr(searching, "FEWEST_STEPS", 1)
    monkeypatch.setattr(searching, "PRECISIONS", ("float32",))
    save_classifier(tmp_path / "given", layers=2)
    texts = [" ".join(words) for words in itertools.product(WORDS, repeat=3)]
    data = Dataset.from_list([{"text": text, "label": ("negative", "positive")["good" in text]} for text in texts])
    stages = [{"search": {"short": 0.5}}, {"distil": {"steps": 2, "batch_size": 8}}]
    recipe = parse_recipe({"stages": stages, "target": {"max_drop": 1.0, "tokens": 8, "max_size": 12_000}})
    folder, columns = tmp_path / "run", TextColumns(max_length=12)
    parts = data.train_test_split(60, seed=0)
    rows, right = check_choice(
        str(tmp_path / "given"), recipe, parts["train"], parts["test"], folder, columns, rounds=2
    )
    assert [row["trained to the end"] for row in rows] == ["given", *some]
    assert [row["to the choice"] for row in rows].count("the choice") == 1
    assert isinstance(right, bool)
    assert count_steps(read_result(folder).candidates) in (3, 4)  # two structures for a step, and one or both for two
    assert len(list(folder.glob("stages/*-distil-*"))) == 4


def test_steps_are_counted_once_for_all_precisions():
    rows = [{"tried": f"pruned, experts, {form}", "steps": "20"} for form in ("float32", "int8")]
    assert count_steps([*rows, {"tried": "as it is, int8", "steps": "0"}]) == 20
    assert count_steps([*rows, rows[0] | {"steps": "100"}]) == 120
