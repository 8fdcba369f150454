"""Pictures show what they were given, and are drawn without global state."""

import io
import math

import matplotlib.image
import numpy as np
import pytest
import torch
from matplotlib import pyplot
from matplotlib.figure import Figure

from hf_moebert.reporting.pictures import (
    plot_curves,
    plot_distillation_losses,
    plot_expert_load,
    plot_pruning,
    plot_quality_and_speed,
    plot_sparsity,
    plot_stacks,
    plot_transitions,
)


def colours(path):
    hundredths = (100 * matplotlib.image.imread(path)[..., :3]).round().astype(int)  # (height, width, 3)
    return np.unique(hundredths @ [1, 1000, 1_000_000])


def test_expert_load_shows_the_shares_and_not_the_counts(tmp_path):
    load = torch.tensor([[1.0, 1.0], [1.0, 3.0]])
    for name, scale in (("once", 1), ("often", 1000)):
        plot_expert_load(load * scale, tmp_path / f"{name}.png")
    plot_expert_load(load.flip(0), tmp_path / "flipped.png")
    once, often, flipped = ((tmp_path / f"{name}.png").read_bytes() for name in ("once", "often", "flipped"))
    assert once == often
    assert once != flipped


def test_expert_load_of_one_expert_and_of_many(tmp_path):
    for experts in (1, 24):
        plot_expert_load(torch.ones(3, experts), tmp_path / f"{experts}.svg")
    text = (tmp_path / "24.svg").read_text()
    assert text.startswith("<?xml")
    assert text != (tmp_path / "1.svg").read_text()


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (torch.ones(4), r"`load` must be of shape \(layers, experts\), got \(4,\)"),
        (torch.ones(0, 4), r"`load` must be of shape \(layers, experts\), got \(0, 4\)"),
        (torch.tensor([[1.0, -1.0]]), "`load` must be finite, at least 0"),
        (torch.tensor([[1.0, math.nan]]), "`load` must be finite, at least 0"),
        (torch.tensor([[1, 1], [0, 0]]), "above 0 somewhere in each layer"),
    ],
)
def test_expert_load_refuses_what_has_no_shares(tmp_path, load, message):
    with pytest.raises(ValueError, match=message):
        plot_expert_load(load, tmp_path / "load.png")


def test_distillation_losses_draws_one_line_per_loss(tmp_path):
    def history(layers):
        losses = {f"loss_hidden_{layer}": 0.5 * (layer + 1) for layer in range(layers)}
        return [{"step": step, "loss": 9.0, "loss_prediction": 1 / step} | losses for step in (1, 2, 3)]

    few, many = tmp_path / "few.png", tmp_path / "many.png"
    plot_distillation_losses([*history(2), {"step": 3, "eval_loss": 1.0}], few)
    plot_distillation_losses(history(8), many)
    # each line has its own colour: six more layers, at least six more colours
    assert len(colours(many)) >= len(colours(few)) + 6


def test_distillation_losses_leave_out_what_a_logarithm_cannot_show(tmp_path):
    history = [
        {"step": 1, "loss_hidden_0": 0.0},
        {"step": 2, "loss_hidden_0": math.inf},
        {"step": 3, "loss_hidden_0": 1.0},
    ]
    plot_distillation_losses(history, tmp_path / "all.png")
    plot_distillation_losses(history[2:], tmp_path / "last.png")
    assert (tmp_path / "all.png").read_bytes() == (tmp_path / "last.png").read_bytes()


def test_distillation_losses_refuses_a_history_without_them(tmp_path):
    with pytest.raises(ValueError, match="`log_history` must hold `loss_hidden_<k>`"):
        plot_distillation_losses([{"step": 1, "loss": 1.0, "eval_loss_hidden_1": 1.0}], tmp_path / "x.png")


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved, so that a test can read what they show."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    return figures


def pruning_history(**thresholds):
    """Three logs of a pruning, from step 10 on; thresholds may be set by step, as `at_20=0.5`."""
    history = [
        {"step": 10 * n, "platon_ratio": r, "platon_sparsity": 1 - r} for n, r in ((1, 1.0), (2, 0.75), (3, 0.5))
    ]
    for entry in history:
        entry |= {"platon_revived": entry["platon_sparsity"] / 100, "loss": 9.0}
        entry |= {f"platon_sparsity/encoder.layer.{n}.query.weight": entry["platon_sparsity"] for n in range(2)}
        if f"at_{entry['step']}" in thresholds:
            entry["platon_threshold"] = thresholds[f"at_{entry['step']}"]
    return [*history, {"step": 30, "eval_loss": 1.0}]


def ticks(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def test_sparsity_shows_the_last_share_of_each_matrix_in_its_place(drawn):
    history = pruning_history()
    history[-2] |= {
        "platon_sparsity/encoder.layer.0.query.weight": 0.2,
        "platon_sparsity/encoder.layer.1.query.weight": 0.8,
        "platon_sparsity/encoder.layer.1.query.bias": 1.0,
    }
    plot_sparsity(history, "sparsity.png")
    axes = drawn[0].axes[0]
    (image,) = axes.get_images()
    np.testing.assert_array_equal(image.get_array().filled(np.nan), [[0.2, np.nan], [0.8, 1.0]])
    assert image.get_clim() == (0, 1)
    assert {text.get_text(): text.get_position() for text in axes.texts} == {
        "20%": (0, 0),
        "80%": (0, 1),
        "100%": (1, 1),
    }
    assert (ticks(axes.yaxis), ticks(axes.xaxis)) == (["0", "1"], ["query", "query.bias"])
    assert axes.get_title() == "Share of zeros, 50.0% over all"


def test_sparsity_keeps_stacks_and_lone_matrices_apart(drawn):
    names = ["encoder.block.0.layer.0.q", "decoder.block.0.layer.0.q", "head"]
    shares = {f"platon_sparsity/{name}.weight": 0.25 * (n + 1) for n, name in enumerate(names)}
    plot_sparsity([{"step": 1, "platon_sparsity": 0.5} | shares], "sparsity.png")
    axes = drawn[0].axes[0]
    table = axes.get_images()[0].get_array().filled(np.nan)
    np.testing.assert_array_equal(table, [[0.25, np.nan], [0.5, np.nan], [np.nan, 0.75]])
    assert ticks(axes.yaxis) == ["encoder.block.0", "decoder.block.0", ""]
    assert ticks(axes.xaxis) == ["layer.0.q", "head"]


@pytest.mark.parametrize("history", [[], [{"step": 1, "loss": 1.0}], [{"step": 1, "platon_sparsity": 0.5}]])
def test_sparsity_refuses_a_history_without_shares(tmp_path, history):
    with pytest.raises(ValueError, match="`log_history` must hold `platon_sparsity/<parameter>`, got none"):
        plot_sparsity(history, tmp_path / "sparsity.png")


def test_pruning_shows_what_was_logged_step_by_step(drawn):
    plot_pruning(pruning_history(at_20=1e-9, at_30=1e-6), "pruning.png")
    schedule, threshold, revived = drawn[0].axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in schedule.lines}
    assert lines == {name: [[10, 1.0], [20, 0.75], [30, 0.5]] for name in ("schedule", "not zero")}
    np.testing.assert_array_equal(threshold.lines[0].get_ydata(), [np.nan, 1e-9, 1e-6])
    np.testing.assert_allclose(revived.lines[0].get_ydata(), [0, 0.0025, 0.005])
    assert threshold.get_yscale() == "log"
    assert revived.get_ylim() == pytest.approx((0, 0.00525))


def test_pruning_shows_thresholds_below_zero_and_leaves_out_zero_where_there_are_none(drawn):
    plot_pruning(pruning_history(at_20=-0.5, at_30=0.0), "pruning.png")
    plot_pruning(pruning_history(at_20=0.0, at_30=0.5), "pruning.png")
    signed, unsigned = (figure.axes[1] for figure in drawn)
    np.testing.assert_array_equal(signed.lines[0].get_ydata(), [np.nan, -0.5, 0])
    np.testing.assert_array_equal(unsigned.lines[0].get_ydata(), [np.nan, np.nan, 0.5])
    assert (signed.get_yscale(), unsigned.get_yscale()) == ("linear", "log")


def test_pruning_refuses_a_history_without_ratios(tmp_path):
    with pytest.raises(ValueError, match="`log_history` must hold `platon_ratio`, got none"):
        plot_pruning([{"step": 1, "platon_sparsity": 0.5}], tmp_path / "pruning.png")


def quality_point(model, precision, accuracy, **speed_ups):
    """A point whose intervals reach 0.1 down and 0.2 up."""
    return {
        "model": model,
        "precision": precision,
        "quality": {"value": accuracy, "low": accuracy - 0.1, "high": accuracy + 0.2},
        "speed_up": {way: {"median": r, "low": r - 0.1, "high": r + 0.2} for way, r in speed_ups.items()},
    }


POINTS = [
    quality_point("dense", "stock", 0.7, one=1.0, many=1.0),
    quality_point("dense", "int8", 0.6, one=2.0, many=3.0),
    quality_point("small", "int8", 0.5, one=4.0, many=5.0),
]


def test_quality_and_speed_shows_every_model_at_every_precision(drawn):
    plot_quality_and_speed(POINTS, "points.png", quality="accuracy")
    (figure,) = drawn
    for axes, speed_ups, way in zip(figure.axes, ([1, 2, 4], [1, 3, 5]), ("one", "many"), strict=True):
        dots = axes.lines[:3]
        assert [dot.get_xydata().tolist() for dot in dots] == [
            [[x, y]] for x, y in zip(speed_ups, (0.7, 0.6, 0.5), strict=True)
        ]
        stock, dense, small = dots
        assert stock.get_color() == dense.get_color() != small.get_color()
        assert stock.get_marker() != dense.get_marker() == small.get_marker()
        across, along = (bars.get_segments() for bars in axes.collections[-2:])
        np.testing.assert_allclose(across, [[[speed_ups[2] - 0.1, 0.5], [speed_ups[2] + 0.2, 0.5]]])
        np.testing.assert_allclose(along, [[[speed_ups[2], 0.4], [speed_ups[2], 0.7]]])
        assert axes.get_xlabel() == f"speed-up, {way}"
    assert figure.axes[0].get_ylabel() == "accuracy"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["dense", "small", "stock", "int8"]


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([], "`points` must hold at least one, all timed in the same ways"),
        ([POINTS[0], quality_point("small", "int8", 0.5, one=4.0)], "all timed in the same ways"),
        ([quality_point("dense", str(n), 0.5, one=1.0) for n in range(9)], "at most 7 precisions"),
    ],
)
def test_quality_and_speed_refuses_what_cannot_be_told_apart(tmp_path, points, message):
    with pytest.raises(ValueError, match=message):
        plot_quality_and_speed(points, tmp_path / "points.png", quality="accuracy")


def test_pictures_leave_pyplot_alone(tmp_path):
    open_before = pyplot.get_fignums()
    plot_expert_load(torch.ones(1, 2), tmp_path / "load.png")
    plot_distillation_losses([{"step": 1, "loss_prediction": 1.0}], tmp_path / "losses.png")
    plot_sparsity(pruning_history(), tmp_path / "sparsity.png")
    plot_pruning(pruning_history(), tmp_path / "pruning.png")
    plot_quality_and_speed(POINTS, tmp_path / "points.png", quality="accuracy")
    plot_transitions(torch.ones(2, 2), torch.ones(2, 2) == 1, ["O"], tmp_path / "transitions.png")
    assert pyplot.get_fignums() == open_before


@pytest.mark.parametrize("lines", [2, 12])
def test_curves_are_drawn_one_for_each_name(drawn, lines):
    curves = {f"line {n}": ([1, 2, 4], [n, n + 1, n * 0.5]) for n in range(lines)}
    plot_curves(curves, io.BytesIO(), x="size", y="error")
    (figure,) = drawn
    (axes,) = figure.axes
    assert [line.get_label() for line in axes.lines] == list(curves)
    for line, (positions, values) in zip(axes.lines, curves.values(), strict=True):
        np.testing.assert_array_equal(line.get_data(), (positions, values))
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("size", "error")
    assert len({tuple(np.ravel(line.get_color())) for line in axes.lines}) == lines


@pytest.mark.parametrize("curves", [{}, {"empty": ([], [])}])
def test_curves_refuse_to_show_nothing(tmp_path, curves):
    with pytest.raises(ValueError, match="`curves` must hold lines of at least one point"):
        plot_curves(curves, tmp_path / "nothing.png", x="x", y="y")


def test_transitions_show_the_scores_and_hatch_what_is_forbidden(drawn):
    scores = torch.arange(9.0).view(3, 3) - 4
    legal = torch.tensor([[True, False, True], [True, True, True], [True, False, True]])
    scores[0, 1] = -math.inf  # what is forbidden may hold anything
    plot_transitions(scores, legal, ["O", "B-a"], io.BytesIO())
    axes = drawn[0].axes[0]
    shown = np.where(legal, scores, np.nan)
    np.testing.assert_array_equal(np.ma.filled(axes.images[0].get_array(), np.nan), shown)
    assert [text.get_text() for text in axes.get_yticklabels()] == ["START", "O", "B-a"]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["O", "B-a", "END"]
    cells = [(patch.get_x() + 0.5, patch.get_y() + 0.5) for patch in axes.patches]
    assert cells == [(1, 0), (1, 2)]
    assert all(patch.get_hatch() for patch in axes.patches)


@pytest.mark.parametrize(
    ("scores", "legal", "message"),
    [
        (
            torch.zeros(2, 2),
            torch.ones(3, 3) == 1,
            r"must be of shape \(3, 3\) for 2 labels, got \(2, 2\) and \(3, 3\)",
        ),
        (torch.zeros(3, 3), torch.ones(2, 3) == 1, r"got \(3, 3\) and \(2, 3\). Put START above"),
        (torch.zeros(3, 3), torch.zeros(3, 3) == 1, "must be finite wherever `legal` is, and that somewhere"),
        (torch.full((3, 3), math.nan), torch.ones(3, 3) == 1, "must be finite wherever"),
    ],
)
def test_transitions_refuse_what_is_no_table_of_steps(tmp_path, scores, legal, message):
    with pytest.raises(ValueError, match=message):
        plot_transitions(scores, legal, ["O", "B-a"], tmp_path / "transitions.png")


def test_stacks_show_every_part_and_refuse_uneven_ones(tmp_path):
    parts = {"shared": [1, 2], "specific": [3, 0], "inactive": [0, 2]}
    plot_stacks(parts, tmp_path / "three.png", x="block", y="units")
    plot_stacks({"shared": [1, 2]}, tmp_path / "one.png", x="block", y="units")
    assert len(colours(tmp_path / "three.png")) >= len(colours(tmp_path / "one.png")) + 2
    for uneven in ({}, {"shared": [1, 2], "specific": [3]}):
        with pytest.raises(ValueError, match="`parts` must hold lists of one length"):
            plot_stacks(uneven, tmp_path / "never.png", x="block", y="units")
