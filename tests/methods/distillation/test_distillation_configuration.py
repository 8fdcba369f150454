import dataclasses

import pytest
from transformers import HfArgumentParser

from hf_moebert.methods import distillation
from hf_moebert.methods.distillation import DistillationConfig


def test_public_names():
    assert sorted(distillation.__all__) == ["DistillationConfig", "DistillationTrainer"]


def test_every_knob_says_what_it_does_and_none_can_change_later():
    assert all(field.metadata["help"] for field in dataclasses.fields(DistillationConfig))
    with pytest.raises(dataclasses.FrozenInstanceError):
        DistillationConfig().weight = 2.0


def test_the_command_line_sets_every_knob():
    parser = HfArgumentParser(DistillationConfig)
    (config,) = parser.parse_args_into_dataclasses([])
    assert config == DistillationConfig(1.0, None, True, False)
    (config,) = parser.parse_args_into_dataclasses(
        ["--weight", "5", "--layer_map", "2", "4", "--no_mask_padding", "--reference_teacher_dropout"]
    )
    assert config == DistillationConfig(5.0, [2, 4], False, True)
    (config,) = parser.parse_args_into_dataclasses(["--no_hidden_states", "--temperature", "2"])
    assert config == DistillationConfig(hidden_states=False, temperature=2.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"weight": -0.1}, r"`weight` must be a finite number of at least 0, got -0.1. Use"),
        ({"weight": float("nan")}, "got nan"),
        ({"weight": float("inf")}, "got inf"),
        ({"weight": "1"}, "got '1'"),
        ({"weight": True}, "got True"),
        ({"layer_map": []}, r"`layer_map` must list layer numbers counted from 1, got \[\]"),
        ({"layer_map": [0, 1]}, r"got \[0, 1\].*embeddings need no entry"),
        ({"layer_map": [1.5]}, r"got \[1.5\]"),
        ({"layer_map": [True]}, r"got \[True\]"),
        ({"layer_map": "24"}, "got '24'"),
        ({"mask_padding": "false"}, "`mask_padding` must be True or False, got 'false'"),
        ({"hidden_states": "no"}, "`hidden_states` must be True or False, got 'no'"),
        (
            {"hidden_states": False, "layer_map": [2]},
            r"`layer_map` must be None when `hidden_states` is False, got \[2",
        ),
        ({"temperature": 0}, "`temperature` must be None or a finite number above 0, got 0. Use 2.0"),
        ({"temperature": float("inf")}, "`temperature` must be.* got inf"),
        ({"temperature": "2"}, "`temperature` must be.* got '2'"),
        ({"reference_teacher_dropout": None}, "`reference_teacher_dropout` must be True or False, got None"),
    ],
)
def test_bad_values_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        DistillationConfig(**values)


def test_layers_follow_each_other_or_the_map_and_embeddings_always_embeddings():
    assert DistillationConfig().teacher_layers(3, 3) == [0, 1, 2, 3]
    assert DistillationConfig(layer_map=[2, 4, 6]).teacher_layers(3, 6) == [0, 2, 4, 6]
    assert DistillationConfig(hidden_states=False).teacher_layers(2, 6) == []
    assert DistillationConfig(layer_map=[3, 3]).teacher_layers(2, 3) == [0, 3, 3]


@pytest.mark.parametrize(
    ("layer_map", "depths", "message"),
    [
        (None, (3, 6), r"`layer_map` must be set when the depths differ.* 3 .* 6 layers. Use layer_map=\[2, 4, 6\]"),
        ([2, 4], (3, 6), r"one number from 1 to 6 for each of the 3 layers.*got \[2, 4\]. Use layer_map=\[2, 4, 6\]"),
        ([2, 4, 7], (3, 6), r"one number from 1 to 6.*got \[2, 4, 7\]"),
    ],
)
def test_a_map_that_does_not_fit_the_depths_is_refused(layer_map, depths, message):
    with pytest.raises(ValueError, match=message):
        DistillationConfig(layer_map=layer_map).teacher_layers(*depths)
