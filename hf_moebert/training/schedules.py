"""Schedules of a training run, as pure functions of the optimiser step."""


def linear_ramp(step: int, *, begin: int, end: int) -> float:
    """Rise from 0 at step `begin` to 1 at step `end`, and stay there.

    Raises:
        ValueError: If `end` does not come after `begin`.
    """
    if end <= begin:
        raise ValueError(
            f"`end` must come after `begin`, got {end} and {begin}. Leave at least one step for the ramp."
        )
    return min(max((step - begin) / (end - begin), 0.0), 1.0)


def cubic_decay(step: int, *, begin: int, end: int, final: float) -> float:
    """Fall from 1 at step `begin` to `final` at step `end`: fast at first, then ever slower.

    Raises:
        ValueError: If `end` does not come after `begin`.

    Source: Zhu and Gupta 2017, https://arxiv.org/abs/1710.01878, eq. 1; Zhang et al. 2022,
    https://arxiv.org/abs/2206.12562, use it with a warm-up at either end.
    """
    return final + (1 - final) * (1 - linear_ramp(step, begin=begin, end=end)) ** 3
