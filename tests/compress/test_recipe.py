"""Recipes: what is read, what is refused before anything is loaded, and how the command line changes them."""

import pytest
from hypothesis import given, strategies as st

from hf_moebert.compress.recipe import ORDER, STAGES
from hf_moebert.compress.recipe_file import change_recipe, parse_recipe, read_recipe, shipped_recipes


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_are_read_and_say_what_they_are_for(name):
    recipe = read_recipe(name)
    assert parse_recipe(recipe.as_dict()) == recipe
    assert shipped_recipes()[name].endswith((".", ")."))


def test_the_command_line_changes_options():
    recipe = read_recipe("fast-cpu", changes=["prune.keep_ratio=0.3", "target.max_drop=0.5", "seed=3"], speedup=2.5)
    assert recipe.stages[0].keep_ratio == 0.3
    assert (recipe.target.max_drop, recipe.target.speedup, recipe.seed) == (0.5, 2.5, 3)
    by_speed = change_recipe(recipe, "prune.speed_up=2.0")
    assert (by_speed.stages[0].keep_ratio, by_speed.stages[0].speed_up) == (None, 2.0)


MASKED = {"prune": {"keep_ratio": 0.5, "method": "masks"}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "`recipe` must be a mapping with `stages`"),
        ({"stages": []}, "`stages` must hold at least one stage"),
        ({"stages": "prune"}, "`stages` must be a list"),
        ({"stages": ["prunee"]}, r"unknown name 'prunee'. Did you mean prune\?"),
        ({"stages": [{"experts": {"num_expert": 4}}]}, r"unknown name 'num_expert'. Did you mean num_experts\?"),
        ({"stages": ["optimize"], "sed": 1}, r"unknown name 'sed'. Did you mean seed\?"),
        ({"stages": ["optimize"], "version": 2}, "`version` must be 1, got 2"),
        ({"stages": ["optimize"], "export": ["tflite"]}, "`export` must hold onnx or onnx-int8, got 'tflite'"),
        ({"stages": ["optimize"], "export": "onnx"}, "`export` must be a list"),
        ({"stages": ["optimize"], "seed": -1}, "`seed` must be a whole number of at least 0, got -1"),
        ({"stages": ["optimize"], "target": {"speedup": 0.5}}, "`speedup` must be above 1, got 0.5"),
        ({"stages": ["optimize"], "target": {"max_drop": "a"}}, "`max_drop` must be a finite number of at least 0"),
        ({"stages": ["prune"]}, "exactly one of `keep_ratio` and `speed_up`, got None and None"),
        ({"stages": [{"prune": {"keep_ratio": 1.5}}]}, r"`keep_ratio` must be in \(0, 1\), got 1.5"),
        ({"stages": [{"prune": {"keep_ratio": 0.5, "granularity": "2:4"}}]}, "`granularity` must be structured"),
        ({"stages": [{"optimize": {"precision": "int4"}}]}, "`precision` must be one of"),
        ({"stages": [{"distil": {"steps": 0}}]}, "`steps` must be above 0, got 0"),
        ({"stages": ["experts", {"prune": {"keep_ratio": 0.5}}]}, "must be in the order prune, experts, got experts"),
        ({"stages": ["experts", "experts"]}, "once, got experts again"),
        ({"stages": ["distil", "distil"]}, "`distil` must not follow another one"),
        ({"stages": [{"prune": {"keep_ratio": 0.5, "method": "platon"}}]}, "`distil` must follow `prune` by platon"),
        (
            {
                "stages": [
                    {"prune": {"keep_ratio": 0.5, "method": "platon", "granularity": "2:4"}},
                    "distil",
                    "experts",
                ]
            },
            "must be followed by distil and pack alone",
        ),
        ({"stages": [MASKED, "distil", "experts"]}, "`prune` by masks must not be followed by experts"),
        ({"stages": [{"prune": {"speed_up": 2.0, "method": "masks"}}, "distil"]}, "must have a `keep_ratio`, and no"),
        ({"stages": ["trim_vocabulary", "distil"]}, "`trim_vocabulary` must follow distil"),
        ({"stages": [{"trim_vocabulary": {"coverage": 0}}]}, r"`coverage` must be in \(0, 1\], got 0"),
        ({"stages": ["distil"], "target": {"tokens": "all"}}, "`tokens` must be a whole number above 0, or real"),
    ],
)
def test_what_cannot_be_is_refused(content, message):
    with pytest.raises(ValueError, match=message):
        parse_recipe(content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("prune", "`set` must be of the form stage.option=value"),
        ("experts.num_experts=4", "`set` must change one of target, optimize"),
        ("optimize.precisoin=int8", r"Did you mean precision\?"),
        ("optimize.precision=[", "`set` must give a value in YAML"),
    ],
)
def test_changes_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        change_recipe(read_recipe("int8"), change)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "`recipe` must be YAML"),
        ("!!python/object/apply:os.system [ls]", "`recipe` must be YAML"),
        ("x" * 200_000, "at most"),
    ],
)
def test_files_that_are_no_recipes_are_refused(tmp_path, text, message):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_recipe(file)
    with pytest.raises(ValueError, match="must be an existing file"):
        read_recipe(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match=r"must be a .yaml file or one of .*moebert.*, got 'fast'"):
        read_recipe("fast")


@given(st.lists(st.sampled_from(sorted(STAGES)), min_size=1, max_size=5))
def test_an_order_that_is_taken_is_one_that_works(names):
    stages = [{name: {"keep_ratio": 0.5} if name == "prune" else {}} for name in names]
    try:
        recipe = parse_recipe({"stages": stages})
    except ValueError:
        return
    kept = [stage.name for stage in recipe.stages if stage.name in ORDER]
    assert kept == sorted(kept, key=ORDER.index)
