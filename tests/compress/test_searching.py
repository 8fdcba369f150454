"""What is trained, and in which order: by speed before training, by quality after a short one."""

import math

from hf_moebert.compress.recipe import Target
from hf_moebert.compress.searching import STRUCTURES, Candidate, choose_fast, rank, structures_for


def candidate(structure, *, difference=math.nan, speedup=1.0, precision="float32", size=100):
    return Candidate(structure, precision, 0, difference, speedup, size)


def names(candidates):
    return [c.structure for c in candidates]


def test_units_are_pruned_to_the_speed_up_that_is_asked_for():
    assert structures_for(Target(max_size=100)) == STRUCTURES
    (name,) = structures_for(Target(speedup=2.0)).keys() - STRUCTURES.keys()
    assert structures_for(Target(speedup=2.0))[name][0].speed_up == 2.2


def test_only_what_is_fast_and_small_enough_is_trained():
    timed = [
        candidate("a", speedup=1.5),
        candidate("a", speedup=2.5, precision="int8"),
        candidate("b", speedup=1.6),
        candidate("d", speedup=1.9),
        candidate("c", speedup=3.0, size=200),
    ]
    assert choose_fast(timed, Target(speedup=2.0)) == ["a", "d", "c"]  # a near one, too
    assert choose_fast(timed, Target(speedup=2.0, max_size=100)) == ["a", "d"]
    assert choose_fast(timed, Target(speedup=4.0)) == ["c", "a"]


def test_with_a_target_the_best_score_comes_first():
    tried = [
        candidate("slow", difference=0.0, speedup=1.5),
        candidate("good", difference=-0.01, speedup=2.1),
        candidate("good", difference=-0.02, speedup=2.9, precision="int8"),
        candidate("fast", difference=-0.05, speedup=4.0),
    ]
    ranked = rank(tried, Target(speedup=2.0, max_drop=0.02))
    assert names(ranked) == ["good", "fast", "slow"]
    assert ranked[0].precision == "float32"
    assert names(rank(tried, Target(speedup=2.0, max_drop=0.01))) == ["good", "slow", "fast"]  # too much is lost


def test_what_lost_far_too_much_is_never_the_best():
    target = Target(speedup=2.0, max_drop=0.01)
    order = [
        candidate("all", difference=0.0, speedup=2.1),
        candidate("fast", difference=-0.02, speedup=2.1),
        candidate("near", difference=0.0, speedup=1.9),
        candidate("slow", difference=0.02, speedup=1.0),
        candidate("neither", difference=-0.02, speedup=1.9),
        candidate("lost", difference=-0.1, speedup=9.0),
    ]
    assert sorted(order, key=lambda c: c.worth(target), reverse=True) == order


def test_without_one_the_fastest_that_may_keep_the_quality_does():
    tried = [
        candidate("safe", difference=0.0, speedup=1.5),
        candidate("near", difference=-0.02, speedup=2.0),
        candidate("near", difference=-0.025, speedup=3.0, precision="int8"),
        candidate("lost", difference=-0.2, speedup=9.0),
    ]
    ranked = rank(tried, Target(max_drop=0.01))
    assert names(ranked) == ["near", "safe", "lost"]
    assert ranked[0].precision == "int8"
