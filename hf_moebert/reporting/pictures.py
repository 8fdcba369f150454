"""Draw how compression changes a model, its quality and its speed."""

import math
import re
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import numpy as np
from torch import Tensor


try:
    from matplotlib import colormaps
    from matplotlib.colors import CenteredNorm
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import MaxNLocator
except ImportError as error:
    raise ImportError("Pictures need matplotlib. Use `pip install hf_moebert[plots]`.") from error


def plot_expert_load(load: Tensor, path: str | PathLike[str]) -> None:
    """Draw the share of tokens that each expert of each layer received.

    Args:
        load: Counts or shares of tokens. Shape `(layers, experts)`.
        path: Image file to write; its suffix selects the format.

    Raises:
        ValueError: If the shape is another, if a count is negative or not finite, or if a layer received no token.
    """
    if load.ndim != 2 or not load.numel():
        raise ValueError(f"`load` must be of shape (layers, experts), got {tuple(load.shape)}.")
    counts = load.detach().cpu().double()  # (layers, experts)
    if not counts.isfinite().all() or (counts < 0).any() or (counts.sum(-1) == 0).any():
        raise ValueError(
            f"`load` must be finite, at least 0, and above 0 somewhere in each layer, got {load.tolist()}."
        )
    shares = (counts / counts.sum(-1, keepdim=True)).numpy()  # (layers, experts)
    layers, experts = shares.shape
    figure = Figure(figsize=(max(4.5, 2.2 + 0.6 * experts), max(2.8, 1.4 + 0.36 * layers)), layout="constrained")
    axes = figure.subplots()
    uniform = 1 / experts
    half_range = max(uniform, float(shares.max()) - uniform)
    image = axes.imshow(shares, cmap="RdBu_r", norm=CenteredNorm(uniform, half_range))
    axes.set_aspect("auto")
    for layer, expert in ((layer, expert) for layer in range(layers) for expert in range(experts)):
        share = float(shares[layer, expert])
        dark = abs(share - uniform) > 0.6 * half_range
        axes.text(
            expert, layer, f"{share:.0%}", ha="center", va="center", fontsize=8, color="white" if dark else "black"
        )
    axes.set(xlabel="expert", ylabel="layer", xticks=range(experts), yticks=range(layers), title="Share of tokens")
    bar = figure.colorbar(image, ax=axes, format=lambda share, _: f"{share:.0%}")
    bar.ax.set_ylim(0, None)  # the scale is symmetric about the uniform share, but there are no negative shares
    bar.ax.axhline(uniform, color="black", linewidth=1.5)
    bar.set_label(f"line: uniform, {uniform:.1%}")
    figure.savefig(path, dpi=150)


def plot_distillation_losses(log_history: Sequence[Mapping[str, Any]], path: str | PathLike[str]) -> None:
    """Draw each distillation loss over the steps of training.

    Args:
        log_history: `trainer.state.log_history`; read are `loss_hidden_<k>` (0 = embeddings) and `loss_prediction`.
        path: Image file to write; its suffix selects the format.

    Raises:
        ValueError: If no such loss was logged.
    """
    logged = {key for entry in log_history for key in entry if re.fullmatch(r"loss_(hidden_\d+|prediction)", key)}
    if not logged:
        raise ValueError("`log_history` must hold `loss_hidden_<k>` or `loss_prediction`, got neither. Train first.")
    hidden = sorted(logged - {"loss_prediction"}, key=lambda key: int(key.rpartition("_")[2]))
    figure = Figure(figsize=(8, max(4, 1.2 + 0.22 * len(logged))), layout="constrained")
    axes = figure.subplots()
    for number, key in enumerate(hidden):
        layer = key.rpartition("_")[2]
        colour = colormaps["viridis"](0.95 * number / max(1, len(hidden) - 1))
        _plot_loss(axes, log_history, key, label="embeddings" if layer == "0" else f"layer {layer}", color=colour)
    if "loss_prediction" in logged:
        _plot_loss(axes, log_history, "loss_prediction", label="prediction", color="crimson", linestyle="--")
    axes.set(xlabel="step", ylabel="loss", yscale="log", title="Distillation losses")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    figure.savefig(path, dpi=150)


def _plot_loss(axes: Any, log_history: Sequence[Mapping[str, Any]], key: str, **style: Any) -> None:
    points = [(entry["step"], entry[key]) for entry in log_history if key in entry]
    # A logarithmic axis has no place for zero or for what is not a number.
    steps, losses = zip(*[(step, loss if 0 < loss < math.inf else math.nan) for step, loss in points], strict=True)
    axes.plot(steps, losses, marker="o", markersize=2.5, linewidth=1.2, **style)


def plot_sparsity(log_history: Sequence[Mapping[str, Any]], path: str | PathLike[str]) -> None:
    """Draw the last logged share of zeros of each pruned parameter, by layer and matrix.

    Args:
        log_history: `trainer.state.log_history`; read are the `platon_sparsity/<parameter>` of its last entry.
        path: Image file to write; its suffix selects the format.

    Raises:
        ValueError: If no such share was logged.
    """
    last: Mapping[str, Any] = next((entry for entry in reversed(log_history) if "platon_sparsity" in entry), {})
    shares = {key.partition("/")[2]: value for key, value in last.items() if key.startswith("platon_sparsity/")}
    if not shares:
        raise ValueError("`log_history` must hold `platon_sparsity/<parameter>`, got none. Prune first.")
    # A name up to its first number is that of the layer, the rest that of the matrix.
    places = {name: re.findall(r"^(?:((?:.*?\.)?\d+)\.)?(.+)", name)[0] for name in shares}
    layers, matrices = (list(dict.fromkeys(part)) for part in zip(*places.values(), strict=True))
    table = np.full((len(layers), len(matrices)), np.nan)  # (layers, matrices)
    for name, (layer, matrix) in places.items():
        table[layers.index(layer), matrices.index(matrix)] = shares[name]
    figure = Figure(
        figsize=(max(4.5, 2.4 + 0.9 * len(matrices)), max(3.4, 2.6 + 0.36 * len(layers))), layout="constrained"
    )
    axes = figure.subplots()
    image = axes.imshow(table, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    for (row, column), share in np.ndenumerate(table):
        if not np.isnan(share):
            colour = "black" if share > 0.6 else "white"
            axes.text(column, row, f"{share:.0%}", ha="center", va="center", fontsize=8, color=colour)
    axes.set(ylabel="layer", title=f"Share of zeros, {last['platon_sparsity']:.1%} over all")
    stacks = {layer.rpartition(".")[0] for layer in layers}  # an encoder and a decoder both have a layer 0
    axes.set_yticks(range(len(layers)), [layer.rpartition(".")[2] for layer in layers] if len(stacks) == 1 else layers)
    names = [matrix.removesuffix(".weight") for matrix in matrices]
    axes.set_xticks(range(len(matrices)), names, rotation=40, ha="right", rotation_mode="anchor", fontsize=8)
    figure.colorbar(image, ax=axes, format=lambda share, _: f"{share:.0%}")
    figure.savefig(path, dpi=150)


def plot_pruning(log_history: Sequence[Mapping[str, Any]], path: str | PathLike[str]) -> None:
    """Draw the schedule beside the real sparsity, the threshold and the revived weights, step by step.

    Args:
        log_history: `trainer.state.log_history`; read are `platon_ratio`, `platon_sparsity`, `platon_threshold` and
            `platon_revived`.
        path: Image file to write; its suffix selects the format.

    Raises:
        ValueError: If nothing of it was logged.
    """
    entries = [entry for entry in log_history if "platon_ratio" in entry]
    if not entries:
        raise ValueError("`log_history` must hold `platon_ratio`, got none. Prune first.")
    keys = ("step", "platon_ratio", "platon_sparsity", "platon_threshold", "platon_revived")
    steps, ratios, zeros, levels, anew = ([entry.get(key, math.nan) for entry in entries] for key in keys)
    figure = Figure(figsize=(8, 7), layout="constrained")
    schedule, threshold, revived = figure.subplots(3, 1, sharex=True)
    schedule.step(steps, ratios, where="post", color="black", label="schedule")
    schedule.plot(steps, [1 - share for share in zeros], "o", color="tab:blue", markersize=3, label="not zero")
    schedule.set(ylabel="weights", ylim=(0, 1.05))
    schedule.legend(fontsize=8)
    signed = any(level < 0 for level in levels)  # movement may be, and a logarithmic axis has no place for that
    threshold.plot(steps, [level if level > 0 or signed else math.nan for level in levels], color="tab:red")
    threshold.set(ylabel="smallest score kept", yscale="linear" if signed else "log")
    revived.plot(steps, anew, color="tab:green", clip_on=False, zorder=3)
    revived.set(ylabel="weights revived", xlabel="step", ylim=(0, 1.05 * max(anew) or 0.01))
    for axes in (schedule, threshold, revived):
        axes.grid(alpha=0.3)
        if axes is not threshold:
            axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.3g}%")
    figure.savefig(path, dpi=150)


def plot_quality_and_speed(points: Sequence[Mapping[str, Any]], path: str | PathLike[str], *, quality: str) -> None:
    """Draw the quality of models against their speed-up: a colour for each model, a marker for each precision.

    Args:
        points: Each has a `model`, a `precision`, a `quality` (`value`, `low`, `high`), and in `speed_up` an interval
            (`median`, `low`, `high`) for each way of timing, which gets its own panel; the first is the baseline.
        path: Image file to write; its suffix selects the format.
        quality: Label of the quality axis.

    Raises:
        ValueError: If there is no point, if points were timed in other ways than the first, or if there are more
            precisions than markers.
    """
    ways = list(points[0]["speed_up"]) if points else []
    if not ways or any(list(point["speed_up"]) != ways for point in points):
        raise ValueError("`points` must hold at least one, all timed in the same ways. Time them in one run.")
    models, precisions = (list(dict.fromkeys(point[key] for point in points)) for key in ("model", "precision"))
    markers = "osD^vP*"
    if len(precisions) > len(markers):
        raise ValueError(f"`points` must be of at most {len(markers)} precisions, got {precisions}. Draw fewer.")
    colours = {model: colormaps["tab10" if len(models) <= 10 else "tab20"](n) for n, model in enumerate(models)}
    shapes = dict(zip(precisions, markers, strict=False))
    figure = Figure(figsize=(1.5 + 5 * len(ways), 5.6), layout="constrained")
    for axes, way in zip(figure.subplots(1, len(ways), sharey=True, squeeze=False)[0], ways, strict=True):
        for point in points:
            _plot_point(axes, point, way, color=colours[point["model"]], marker=shapes[point["precision"]])
        axes.axvline(1, color="grey", linewidth=0.8, linestyle="--", zorder=0)
        axes.axhline(points[0]["quality"]["value"], color="grey", linewidth=0.8, linestyle="--", zorder=0)
        axes.set(xlabel=f"speed-up, {way}", ylabel=quality)
        axes.xaxis.set_major_formatter("{x:g}x")
        axes.grid(alpha=0.2)
        axes.label_outer()
    entries = [
        Line2D([], [], color=colour, marker="o", linestyle="", label=model) for model, colour in colours.items()
    ]
    entries += [
        Line2D([], [], color="black", markerfacecolor="none", marker=shape, linestyle="", label=precision)
        for precision, shape in shapes.items()
    ]
    figure.legend(handles=entries, loc="outside lower center", ncols=min(5, len(entries)), fontsize=9)
    figure.savefig(path, dpi=150)


def _plot_point(axes: Any, point: Mapping[str, Any], way: str, **style: Any) -> None:
    value, ratio = point["quality"], point["speed_up"][way]
    across = [[ratio["median"] - ratio["low"]], [ratio["high"] - ratio["median"]]]
    along = [[value["value"] - value["low"]], [value["high"] - value["value"]]]
    lines = {"fmt": "none", "ecolor": style["color"], "elinewidth": 0.9, "alpha": 0.45}
    axes.errorbar([ratio["median"]], [value["value"]], xerr=across, yerr=along, **lines)
    axes.plot(ratio["median"], value["value"], markersize=7, markeredgecolor="black", markeredgewidth=0.6, **style)


def plot_curves(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], path: str | PathLike[str], *, x: str, y: str
) -> None:
    """Draw one line for each name; more than ten are coloured along a scale, in their order.

    Args:
        curves: Points of each line: positions and values.
        path: Image file to write; its suffix selects the format.
        x: Label of the positions.
        y: Label of the values.

    Raises:
        ValueError: If there is no line, or one of them has no point.
    """
    if not curves or not all(len(values) for _, values in curves.values()):
        raise ValueError(f"`curves` must hold lines of at least one point, got {list(curves)}.")
    few = len(curves) <= 10
    colours = colormaps["tab10"](range(10)) if few else colormaps["viridis"](np.linspace(0, 0.95, len(curves)))
    figure = Figure(figsize=(8, max(5.0, 0.17 * len(curves))), layout="constrained")
    axes = figure.subplots()
    for (name, (positions, values)), colour in zip(curves.items(), colours, strict=False):
        axes.plot(positions, values, marker="o", markersize=3, linewidth=1.2, color=colour, label=name)
    axes.set(xlabel=x, ylabel=y)
    whole = all(float(position).is_integer() for positions, _ in curves.values() for position in positions)
    axes.xaxis.set_major_locator(MaxNLocator(integer=whole))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8 if few else 6)
    figure.savefig(path, dpi=150)


def plot_transitions(scores: Tensor, legal: Tensor, labels: Sequence[str], path: str | PathLike[str]) -> None:
    """Draw the score of every step from one tag to the next; steps that a scheme forbids are grey and hatched.

    Args:
        scores: Rows are the previous tag, START first; columns the next one, END last. Shape `(tags + 1, tags + 1)`.
        legal: True where a step is allowed. Shape `(tags + 1, tags + 1)`.
        labels: Names of the tags.
        path: Image file to write; its suffix selects the format.

    Raises:
        ValueError: If a shape is another, if no step is allowed, or if the score of an allowed one is not finite.
    """
    side = len(labels) + 1
    if tuple(scores.shape) != (side, side) or tuple(legal.shape) != (side, side):
        raise ValueError(
            f"`scores` and `legal` must be of shape {(side, side)} for {len(labels)} labels, got "
            f"{tuple(scores.shape)} and {tuple(legal.shape)}. Put START above the tags and END to the right of them."
        )
    allowed = legal.detach().cpu().bool().numpy()  # (tags + 1, tags + 1)
    table = np.where(allowed, scores.detach().cpu().double().numpy(), np.nan)
    if not allowed.any() or not np.isfinite(table[allowed]).all():
        raise ValueError(f"`scores` must be finite wherever `legal` is, and that somewhere, got {table.tolist()}.")
    cell = 0.34 if side <= 30 else 0.2  # inches
    figure = Figure(figsize=(3.2 + cell * side, 2.6 + cell * side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(table, cmap="RdBu_r", norm=CenteredNorm(0, max(np.abs(table[allowed]).max(), 1e-9)))
    for row, column in np.argwhere(~allowed).tolist():
        corner = (column - 0.5, row - 0.5)
        axes.add_patch(Rectangle(corner, 1, 1, facecolor="lightgrey", edgecolor="grey", hatch="////", linewidth=0))
    axes.set_yticks(range(side), ["START", *labels], fontsize=8)
    axes.set_xticks(range(side), [*labels, "END"], rotation=90, fontsize=8)
    axes.set(ylabel="previous tag", xlabel="next tag", title="Transition scores, hatched: forbidden")
    figure.colorbar(image, ax=axes)
    figure.savefig(path, dpi=150)


def plot_stacks(parts: Mapping[str, Sequence[float]], path: str | PathLike[str], *, x: str, y: str) -> None:
    """Draw a stacked bar of `parts` at each position; `x` and `y` are the labels of the axes.

    Raises:
        ValueError: If there is no part, or if they differ in length.
    """
    if len({len(heights) for heights in parts.values()}) != 1:
        raise ValueError(f"`parts` must hold lists of one length, got {dict(parts)}. Give each a value for every bar.")
    figure, floor = Figure(figsize=(8, 5), layout="constrained"), np.zeros(len(next(iter(parts.values()))))
    axes = figure.subplots()
    for name, heights in parts.items():
        axes.bar(range(len(floor)), heights, bottom=floor, label=name)
        floor = floor + heights
    axes.set(xlabel=x, ylabel=y, xticks=range(len(floor)))
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=150)
