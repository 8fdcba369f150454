"""The latency table of a machine: what a layer costs with fewer neurons and heads, measured on the model itself."""

import copy
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_moebert.architectures.inputs import complete_inputs
from hf_moebert.architectures.positions import count_positions
from hf_moebert.architectures.units import UnitGroup, find_unit_groups, narrow_layers
from hf_moebert.checkpoints.json_files import read_json, save_json
from hf_moebert.inference.linears import Precision
from hf_moebert.inference.optimize import optimize_for_inference

from .latency import SpeedUp, compare_latency, environment, time_rounds


POINTS = 8  # measured widths of each kind besides the full one
STEP = 8  # neurons are measured at multiples of this, which kernels prefer
# What else a table depends on
CONDITIONS = ("python", "torch", "transformers", "system", "cpu", "cpu_capability", "cuda", "threads", "mkl", "mkldnn")


@dataclass(frozen=True)
class LatencyTable:
    """Costs of the layers of a model on this machine, as shares of the time of the dense model.

    Attributes:
        milliseconds: Median time of a forward pass of the dense model.
        halved: Share of that with half of the units of every kind.
        counts: Measured numbers of units in every layer, by kind, ascending; the last one is that of the dense model.
        shares: Share with so many units of this kind and half of those of the others, by kind.
        layers: Number of layers that have units of a kind.
        conditions: Processor, threads, precision, versions and shapes for which it holds.

    Our own design, after the tables of Kurtic et al. 2023 (ZipLM), https://arxiv.org/abs/2302.04089. Where
    much is gone, the rest fits better into caches: so one kind is measured while half of the other is gone.
    """

    milliseconds: float
    halved: float
    counts: dict[str, list[int]]
    shares: dict[str, list[float]]
    layers: dict[str, int]
    conditions: dict[str, Any]

    def costs(self, kind: str) -> Tensor:
        """Return the share of 1, 2, ... units of one layer above that of one unit, `(units,)`."""
        counts, shares = self.counts[kind], np.array(self.shares[kind])
        # A planner looks for what is cheap, and would find the errors of single measurements
        shares[1:-1] = (shares[:-2] + 2 * shares[1:-1] + shares[2:]) / 4
        shares = np.maximum.accumulate(shares)  # more units are never cheaper
        every = np.interp(np.arange(1, counts[-1] + 1), counts, shares)
        return torch.from_numpy((every - every[0]) / self.layers[kind])

    @property
    def smallest(self) -> float:
        """Estimated share with one unit of each kind in every layer."""
        return max(self.halved + sum(shares[0] - self.halved for shares in self.shares.values()), 0.0)

    def estimate(self, widths: list[dict[str, int]]) -> float:
        """Estimate the share with these numbers of units in the layers, by kind."""
        units = [(kind, count) for layer in widths for kind, count in layer.items()]
        return self.smallest + sum(float(self.costs(kind)[count - 1]) for kind, count in units)

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write the table to a JSON file.

        Raises:
            OSError: If it cannot be written.
        """
        save_json(file, asdict(self))

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> Self:
        """Read a table.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is damaged, or holds no table.
        """
        remedy = "Measure it again with `measure_unit_latency`."
        content = read_json(file, remedy=remedy)
        if content.keys() != cls.__dataclass_fields__.keys():
            raise ValueError(f"{str(file)!r} must hold a latency table, got the fields {sorted(content)}. {remedy}")
        return cls(**content)


def measure_unit_latency(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor] | None = None,
    *,
    batch_size: int = 1,
    seq_len: int = 128,
    precision: Precision | None = None,
    rounds: int = 25,
    file: str | os.PathLike[str] | None = None,
) -> LatencyTable:
    """Measure what a forward pass costs with fewer neurons, and with fewer heads, in every layer.

    Copies of the model with up to nine widths of each kind, which share what is not narrowed, run in turns.

    Args:
        model: A dense model whose units can be removed; it is not changed. Its dtype and device are measured.
        inputs: A batch; by default one of made-up ids.
        batch_size: Rows of made-up ids.
        seq_len: Their length.
        precision: Of `optimize_for_inference`, if models are to run so; by default stock torch.
        rounds: Timed rounds.
        file: JSON file that keeps the table. One that holds for the same model and conditions is read and not
            measured again; otherwise it is replaced.

    Raises:
        ValueError: If the model's units cannot be removed, or its layers differ in width; if `rounds` is less than 2,
            the precision does not exist, or the file is damaged.
        OSError: If the file cannot be written.
    """
    groups = find_unit_groups(model)
    if len({(group.kind, group.num_units) for group in groups}) > len({group.kind for group in groups}):
        raise ValueError(
            f"`model` must be dense, with layers of one width, got a {type(model).__name__} whose layers differ. "
            "Measure the model that it was made of."
        )
    inputs = _made_up_inputs(model, batch_size, seq_len) if inputs is None else dict(inputs)
    conditions = _describe(model, groups, inputs) | {"precision": precision}
    if file is not None and Path(file).exists() and (kept := LatencyTable.load(file)).conditions == conditions:
        return kept
    full = {group.kind: group.num_units for group in groups}
    counts = {kind: _grid(kind, units) for kind, units in full.items()}
    half = {kind: max(units // 2, 1) for kind, units in full.items()}
    forms = {"dense": full, "half": half}
    forms |= {f"{kind} {count}": half | {kind: count} for kind, grid in counts.items() for count in grid}
    narrowed = {name: _narrowed(model, groups, form) for name, form in forms.items()}
    calls = {name: _forward(_optimized(copied, precision), inputs) for name, copied in narrowed.items()}
    times = time_rounds(calls, rounds=rounds, clock=_clock_for(model))
    share = {name: float(np.median(of_call / times["dense"])) for name, of_call in times.items()}
    table = LatencyTable(
        milliseconds=float(np.median(times["dense"])) * 1000,
        halved=share["half"],
        counts=counts,
        shares={kind: [share[f"{kind} {count}"] for count in grid] for kind, grid in counts.items()},
        layers={kind: sum(group.kind == kind for group in groups) for kind in counts},
        conditions=conditions,
    )
    if file is not None:
        table.save(file)
    return table


def measure_speed_up(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    inputs: Mapping[str, Tensor] | None = None,
    *,
    batch_size: int = 1,
    seq_len: int = 128,
    precision: Precision | None = None,
    rounds: int = 15,
) -> SpeedUp:
    """Measure how much faster a model is than the dense one that it was made of, as its latency table was measured.

    Args:
        model: The smaller model.
        dense: The dense one.
        inputs: A batch; by default one of made-up ids.
        batch_size: Rows of made-up ids.
        seq_len: Their length.
        precision: Of `optimize_for_inference`, for copies of both; by default both run as they are.
        rounds: Timed rounds, in which both run in turns.

    Raises:
        ValueError: If `rounds` is less than 2, the precision does not exist, or the inputs cannot be made up.
    """
    inputs = _made_up_inputs(dense, batch_size, seq_len) if inputs is None else dict(inputs)
    if precision is not None:
        model, dense = (_optimized(copy.deepcopy(each), precision) for each in (model, dense))
    modes = model.training, dense.training
    calls = {"model": _forward(model.eval(), inputs), "dense": _forward(dense.eval(), inputs)}
    try:
        return compare_latency(calls, baseline="dense", rounds=rounds, clock=_clock_for(dense))["model"]
    finally:
        model.train(modes[0])
        dense.train(modes[1])


def _grid(kind: str, units: int) -> list[int]:
    """Choose the widths that are measured: one unit, about eighths of all, and all."""
    step = STEP if kind == "neurons" else 1
    between = (round(units * part / POINTS / step) * step for part in range(1, POINTS))
    return sorted({1, units, *(count for count in between if 1 < count < units)})


def _narrowed(model: PreTrainedModel, groups: list[UnitGroup], counts: dict[str, int]) -> PreTrainedModel:
    """Copy a model with so many units in every layer; what is not narrowed is shared."""
    members = {p for group in groups for p in (*group.reader_parameters, *group.writer.parameters())}
    shared = {id(parameter): parameter for parameter in model.parameters() if parameter not in members}
    copied = copy.deepcopy(model, shared).eval()
    widths: list[dict[str, int]] = [{} for _ in range(max(group.layer for group in groups) + 1)]
    for group in groups:
        widths[group.layer][group.kind] = counts[group.kind]
    narrow_layers(copied, widths)
    return copied


def _optimized(model: PreTrainedModel, precision: Precision | None) -> PreTrainedModel:
    return model if precision is None else optimize_for_inference(model, precision=precision)


def _clock_for(model: PreTrainedModel) -> Literal["wall", "cpu"]:
    """Choose processor time where one thread does all the work: others on the machine disturb it less."""
    return "cpu" if model.device.type == "cpu" and torch.get_num_threads() == 1 else "wall"


def _forward(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Any:
    return torch.no_grad()(lambda: model(**inputs))


def _made_up_inputs(model: PreTrainedModel, batch_size: int, seq_len: int) -> dict[str, Tensor]:
    """Make up a batch of ids.

    Raises:
        ValueError: If the model takes something else, or not so many tokens.
    """
    if model.main_input_name != "input_ids":
        raise ValueError(f"`inputs` must hold the {model.main_input_name} of a batch for a {type(model).__name__}.")
    longest = count_positions(model) or seq_len
    if batch_size < 1 or not 1 <= seq_len <= longest:
        raise ValueError(
            f"`batch_size` must be at least 1 and `seq_len` in [1, {longest}], got {batch_size} and {seq_len}. Use "
            "those of a usual batch."
        )
    ids = torch.arange(batch_size * seq_len, device=model.device) % model.get_input_embeddings().num_embeddings
    return complete_inputs(model, ids.view(batch_size, seq_len))


def _describe(model: PreTrainedModel, groups: list[UnitGroup], inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """Describe what a table holds for, as JSON keeps it."""
    here = environment()
    return {name: here[name] for name in CONDITIONS} | {
        "model": type(model).__name__,
        "dtype": str(model.dtype),
        "device": str(model.device),
        "attention": model.config._attn_implementation,
        "weights": [list(parameter.shape) for group in groups for parameter in group.reader_parameters],
        "inputs": {name: list(tensor.shape) for name, tensor in inputs.items()},
    }
