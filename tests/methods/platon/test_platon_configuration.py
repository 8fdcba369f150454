"""The recipe: parsing, resolved steps, and what is refused at the door."""

import pytest
from transformers import HfArgumentParser

from hf_moebert import PlatonConfig


def test_the_defaults_are_those_of_the_paper_where_it_says_so():
    config = PlatonConfig()
    assert (config.beta1, config.window, config.sensitivity_at) == (0.85, 10, "pre_step")


@pytest.mark.parametrize(
    ("initial", "final", "steps", "expected"),
    [(0.08, 0.35, 1000, (80, 650)), (10, 20, 100, (10, 80)), (0, 1, 100, (0, 99)), (0.1, 0.001, 100, (10, 99))],
)
def test_warmups_in_shares_and_steps(initial, final, steps, expected):
    assert PlatonConfig(initial_warmup=initial, final_warmup=final).resolve_steps(steps) == expected


@pytest.mark.parametrize("steps", [40, 100, 101, 30_000])
def test_the_defaults_suit_any_length(steps):
    begin, end = PlatonConfig().resolve_steps(steps)
    assert 0 < begin < end < steps


@pytest.mark.parametrize(("steps", "changes"), [(5, {}), (100, {"initial_warmup": 60, "final_warmup": 40}), (12, {})])
def test_a_run_that_is_too_short(steps, changes):
    with pytest.raises(ValueError, match=rf"The run must be longer than .* got {steps} steps"):
        PlatonConfig(**changes).resolve_steps(steps)


def test_command_line():
    (config,) = HfArgumentParser(PlatonConfig).parse_args_into_dataclasses(
        [
            "--keep_ratio",
            "0.2",
            "--window",
            "5",
            "--initial_warmup",
            "100",
            "--modules",
            "bert.encoder",
            "--criterion",
        ]
        + ["movement"]
    )
    assert config == PlatonConfig(
        keep_ratio=0.2, window=5, initial_warmup=100, modules=["bert.encoder"], criterion="movement"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *[({"keep_ratio": value}, r"`keep_ratio` must be in \(0, 1\], got") for value in (0, -0.1, 1.2, "50%", True)],
        *[({"keep_ratio": value}, r"`keep_ratio` must be in") for value in (float("nan"), float("inf"), None)],
        *[({name: value}, f"`{name}` must be in .0, 1.") for name in ("beta1", "beta2") for value in (0, 1, -1, "x")],
        *[({"window": value}, r"`window` must be a whole number of at least 1") for value in (0, -3, 2.5, True)],
        *[({"initial_warmup": value}, r"`initial_warmup` must be a share") for value in (-0.1, 1.5, "10%")],
        ({"final_warmup": 0}, r"`final_warmup` must be above 0"),
        ({"granularity": "blocks"}, r"`granularity` must be one of unstructured, 2:4, structured, got 'blocks'"),
        ({"criterion": "random"}, r"`criterion` must be one of platon, importance, movement, magnitude"),
        (
            {"criterion": "movement", "granularity": "structured"},
            r"`criterion` must be platon, importance or magnitude with granularity 'structured', got 'movement'",
        ),
        ({"sensitivity_at": "after"}, r"`sensitivity_at` must be one of pre_step, post_step"),
        ({"granularity": "2:4"}, r"`keep_ratio` must be 0.5 with granularity '2:4', got 0.1"),
        ({"min_keep": 0.2}, r"`min_keep` must be in \[0, 0.1\], got 0.2"),
        ({"modules": "bert"}, r"`modules` must list paths of modules, got 'bert'"),
        ({"modules": [""]}, r"`modules` must list paths of modules"),
        ({"include_bias": "yes"}, r"`include_bias` must be True or False, got 'yes'"),
        ({"granularity": "structured", "reference_parity": True}, r"`reference_parity` must be False with"),
        (
            {"granularity": "2:4", "keep_ratio": 0.5, "reference_parity": True},
            r"False with granularity '2:4'",
        ),
        ({"granularity": "structured", "modules": ["bert"]}, r"`modules` must be None with granularity 'structured'"),
        ({"granularity": "structured", "speed_up": 2.0, "min_keep": 1.1}, r"`min_keep` must be in \[0, 1\], got 1.1"),
        ({"granularity": "structured", "include_bias": True}, r"`include_bias` must be False with"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(ValueError, match=message):
        PlatonConfig(**changes)


def test_differences_are_named():
    config = PlatonConfig(keep_ratio=0.2)
    assert config.differences(vars(PlatonConfig(keep_ratio=0.2)) | {}) == []
    assert config.differences(vars(PlatonConfig())) == ["keep_ratio: 0.1 -> 0.2"]
    assert PlatonConfig(modules=("a",)).differences(vars(PlatonConfig(modules=["a"]))) == []
    older = {key: value for key, value in vars(config).items() if key != "criterion"} | {"gone": 1}
    assert config.differences(older) == ["criterion: None -> 'platon'", "gone: 1 -> None"]
