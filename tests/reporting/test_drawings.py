"""Numbers become places of a drawing."""

import pytest

from hf_moebert.reporting.drawings import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, draw_front, draw_layers, draw_losses


def model(speed, value, low, high):
    gaps = {"f1": {"value": value, "low": low, "high": high}}
    return {"speed_up": {"median": speed}, "differences": gaps}


def is_inside(x, y):
    return LEFT <= x <= WIDTH - RIGHT and TOP <= y <= HEIGHT - BOTTOM


def test_faster_is_to_the_right_and_better_is_above():
    models = {"given": {"speed_up": None, "differences": None}, "small": model(2.0, -0.02, -0.05, 0.01)}
    tried = [
        {"tried": "half", "steps": "20", "difference": "-0.1000", "speed-up": "3.00x"},
        {"tried": "timed", "steps": "0", "difference": "-", "speed-up": "9.00x"},
    ]
    points = {point["what"]: point for point in draw_front(models, "given", "small", "f1", tried)["points"]}
    assert set(points) == {"given", "chosen", "tried"}
    assert points["given"]["x"] < points["chosen"]["x"] < points["tried"]["x"]
    assert points["given"]["y"] < points["chosen"]["y"] < points["tried"]["y"]  # downwards
    assert points["chosen"]["high"] < points["chosen"]["y"] < points["chosen"]["low"]
    assert all(is_inside(point["x"], point[end]) for point in points.values() for end in ("y", "low", "high"))


@pytest.mark.parametrize("losses", [[(1, 2.0), (2, 1.0)], [(1, 0.0), (2, 0.0)]])
def test_losses_are_a_line(losses):
    picture = draw_losses(losses)
    assert all(is_inside(*map(float, point.split(","))) for point in picture["line"].split())
    assert len(picture["ticks_y"]) == 5


def test_bars_stand_on_one_floor():
    bars = draw_layers({"given": [1000, 1000], "chosen": [500]})["bars"]
    assert [bar["what"] for bar in bars] == ["given", "given", "chosen"]
    assert bars[2]["height"] == pytest.approx(bars[0]["height"] / 2)
    assert len({round(bar["y"] + bar["height"], 6) for bar in bars}) == 1
    assert all(is_inside(bar["x"] + bar["width"], bar["y"]) for bar in bars)
