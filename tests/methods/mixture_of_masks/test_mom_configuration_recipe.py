"""The recipe: how the target rises, and what is refused."""

import math

import pytest
from transformers import HfArgumentParser

from hf_moebert.methods.mixture_of_masks import MaskSparsityCallback, MaskSparsityConfig
from hf_moebert.methods.mixture_of_masks.recipe import RAMPS


def targets(steps, **recipe):
    callback = MaskSparsityCallback(MaskSparsityConfig(**{"ramp_share": 0.5, "learn_share": 1.0} | recipe))
    callback._ramp_steps = callback.config.ramp_steps(steps)
    return [callback.target_at(clock) for clock in range(steps + 1)]


@pytest.mark.parametrize("ramp", RAMPS)
@pytest.mark.parametrize(("keep_ratio", "ramp_share"), [(0.5, 0.5), (0.25, 1.0), (0.9, 0.1), (1, 0.5)])
def test_the_target_rises_from_nothing_to_what_is_asked_for(ramp, keep_ratio, ramp_share):
    found = targets(100, ramp=ramp, keep_ratio=keep_ratio, ramp_share=ramp_share)
    last = round(100 * ramp_share)
    assert found[0] == 0
    assert found[last:] == [pytest.approx(1 - keep_ratio)] * (101 - last)
    assert found == sorted(found)
    assert keep_ratio == 1 or found[last - 1] < found[last]


def test_the_ramps_are_what_they_are_called():
    for clock, share in enumerate([0, 0.2, 0.4, 0.6, 0.8, 1]):
        assert targets(10)[clock] == pytest.approx(0.5 * share)
        assert targets(10, ramp="cubic")[clock] == pytest.approx(0.5 * (1 - (1 - share) ** 3))


def test_it_can_be_parsed_from_a_command_line():
    (recipe,) = HfArgumentParser(MaskSparsityConfig).parse_args_into_dataclasses(
        ["--keep_ratio", "0.25", "--ramp", "cubic", "--backbone_rate", "1e-4", "--freeze_backbone"]
    )
    assert recipe == MaskSparsityConfig(keep_ratio=0.25, ramp="cubic", backbone_rate=1e-4, freeze_backbone=True)


@pytest.mark.parametrize("name", ["keep_ratio", "ramp_share", "learn_share"])
@pytest.mark.parametrize("value", [0, -0.1, 1.2, math.nan, math.inf, "50%", None, True])
def test_shares_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"`{name}` must be a number in \(0, 1\], got .*Use 0.5"):
        MaskSparsityConfig(**{name: value})


@pytest.mark.parametrize("name", ["score_rate", "router_rate", "backbone_rate"])
@pytest.mark.parametrize("value", [-1e-3, math.nan, math.inf, "fast", False])
def test_rates_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"`{name}` must be a finite number >= 0, got "):
        MaskSparsityConfig(**{name: value})


def test_the_rest_is_refused():
    assert MaskSparsityConfig().backbone_rate is None
    with pytest.raises(ValueError, match=r"`score_rate` must be a finite number >= 0, got None"):
        MaskSparsityConfig(score_rate=None)
    with pytest.raises(ValueError, match=r"`ramp` must be one of linear, cubic, got 'square'"):
        MaskSparsityConfig(ramp="square")
    with pytest.raises(ValueError, match=r"`freeze_backbone` must be True or False, got 1"):
        MaskSparsityConfig(freeze_backbone=1)
    with pytest.raises(ValueError, match=r"`ramp_share` must leave at least one of the run's 3 steps .*got 0.1"):
        MaskSparsityConfig(ramp_share=0.1).ramp_steps(3)
    with pytest.raises(ValueError, match=r"`learn_share` must be at least `ramp_share`, got 0.3 and 0.4: masks are"):
        MaskSparsityConfig(ramp_share=0.4, learn_share=0.3)
