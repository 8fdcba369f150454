"""Schedules: the golden values of the specification, their shape, and their refusals."""

import itertools

import pytest
from hypothesis import given, strategies as st

from hf_moebert.training.schedules import cubic_decay, linear_ramp


@pytest.mark.parametrize(
    ("step", "ratio"),
    [(10, 1), (11, 0.961976968), (15, 0.820590379), (20, 0.666763848), (45, 0.2125), (79, 0.100002624), (80, 0.1)],
)
def test_cubic_decay_has_the_values_of_the_papers_code(step, ratio):
    """T=100, warm-ups of 10 and 20 steps, from 1 to 0.1."""
    assert cubic_decay(step, begin=10, end=80, final=0.1) == pytest.approx(ratio, abs=5e-10)


@given(st.integers(0, 500), st.integers(1, 500), st.floats(0.01, 1))
def test_cubic_decay_falls_from_one_to_the_end_and_stays(begin, length, final):
    curve = [cubic_decay(step, begin=begin, end=begin + length, final=final) for step in range(begin + length + 3)]
    assert curve[0] == curve[begin] == 1
    assert curve[-1] == curve[begin + length] == pytest.approx(final)
    assert all(later <= earlier for earlier, later in itertools.pairwise(curve))


def test_linear_ramp():
    assert [linear_ramp(step, begin=2, end=6) for step in (0, 2, 3, 4, 6, 9)] == [0, 0, 0.25, 0.5, 1, 1]


def test_a_ramp_needs_a_step():
    with pytest.raises(ValueError, match=r"`end` must come after `begin`, got 3 and 3"):
        linear_ramp(1, begin=3, end=3)
