"""What the gradients have taught about every weight, and which weights that keeps."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from .functional import (
    Selection,
    balance_factors,
    best_two_of_four,
    chunks,
    close_window_,
    count_zeros,
    select_,
    update_movement_,
    update_window_,
)
from .modeling_units import UnitGroup
from .recipe import PlatonConfig


# Tensors of each criterion: one of each for every pruned parameter, flat and in float32.
STATISTICS = {"platon": ("window", "importance", "uncertainty"), "movement": ("movement", "value"), "magnitude": ()}


class Statistics:
    """The running statistics of the prunable parameters, and the scores made of them.

    Attributes:
        tensors: By kind and name of the parameter. Shapes `(numel,)`.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], config: PlatonConfig) -> None:
        self.parameters, self.config = parameters, config
        self.tensors = {
            kind: {name: torch.zeros(p.numel(), device=p.device) for name, p in parameters.items()}
            for kind in STATISTICS[config.criterion]
        }
        for name, value in self.tensors.get("value", {}).items():
            value.copy_(parameters[name].detach().view(-1))
        device = next(iter(parameters.values())).device
        self._scratch = torch.empty(next(chunks(1 << 30, device)).stop, device=device)

    def observe(self, position: int) -> bool:
        """Take in the gradients of a step at this position of its window; False if there is no gradient at all."""
        seen = False
        for name, parameter in self.parameters.items():
            weight = parameter.detach().reshape(-1)
            seen |= parameter.grad is not None
            # A parameter that was not used, such as an expert without a token, has not moved the loss.
            gradient = torch.zeros_like(weight) if parameter.grad is None else parameter.grad.reshape(-1)
            mine = [tensors[name] for tensors in self.tensors.values()]
            if self.config.criterion == "movement":
                movement, value = mine  # the value behind the mask: the gradient goes through it
                update_movement_(movement, value, gradient)
            elif self.config.criterion == "platon" and position:
                update_window_(mine[0], weight, gradient, position)
            elif self.config.criterion == "platon":
                window, importance, uncertainty = mine
                betas = {"beta1": self.config.beta1, "beta2": self.config.beta2}
                close_window_(window, importance, uncertainty, weight, gradient, **betas)
        return seen

    def is_finite(self) -> bool:
        """Whether every gradient of the window was finite; of the run, or the weights, where there are no windows."""
        tensors = next(iter(self.tensors.values()), self.parameters).values()
        return bool(torch.stack([tensor.detach().sum(dtype=torch.float32) for tensor in tensors]).isfinite().all())

    def forget_window(self) -> None:
        """Make the window say what the averages say, so that they stay what they are when they take it in."""
        for name, window in self.tensors["window"].items():
            window.copy_(self.tensors["importance"][name])

    def remember(self, keep: Mapping[str, Tensor]) -> None:
        """Note the values of the weights that are kept; those behind the mask stay what they were.

        Only movement pruning lets a weight come back as it went.
        """
        for name, value in self.tensors.get("value", {}).items():
            weight = self.parameters[name].detach().view(-1).float()
            torch.where(keep[name], weight, value, out=value)

    def restore(self) -> bool:
        """Give the weights their noted values back, if they were noted; say whether they were."""
        values = self.tensors.get("value", {})
        for name, value in values.items():
            self.parameters[name].detach().view(-1).copy_(value)
        return bool(values)

    def score(self, name: str, part: slice) -> Tensor:
        """Score a flat slice of a parameter, `(n,)`; the next call may overwrite the result."""
        if self.config.criterion == "magnitude":
            return self.parameters[name].detach().reshape(-1)[part].float().abs()
        if self.config.criterion == "movement":
            return self.tensors["movement"][name][part].clone()
        factors = [self.tensors[kind][name][part] for kind in ("importance", "uncertainty")]
        length = len(factors[0])
        return torch.mul(*factors, out=self._scratch[:length] if length <= len(self._scratch) else None)


@dataclass
class Piece:
    """What is ranked as one: a parameter, or one expert of a stack.

    Attributes:
        name: Of the parameter.
        start: First element of the piece.
        stop: The element behind its last.
        factor: Of its scores, to make experts count alike.
        protected: Marks what is kept whatever it scores. Shape `(stop - start,)`.
    """

    name: str
    start: int
    stop: int
    factor: float = 1.0
    protected: Tensor | None = None


class WeightSelection:
    """Selects single weights over all pieces together, or two of every four."""

    def __init__(self, statistics: Statistics) -> None:
        self.statistics, self.config = statistics, statistics.config
        self.pieces = [
            piece
            for name, parameter in statistics.parameters.items()
            for piece in _cut(name, parameter.numel(), len(parameter) if parameter.dim() == 3 else 1)
        ]

    def select_(self, masks: Mapping[str, Tensor], ratio: float) -> Selection:
        """Mark what is kept at this ratio."""
        keep = [masks[piece.name][piece.start : piece.stop] for piece in self.pieces]
        numel = sum(map(len, keep))
        zeros = int((1 - ratio) * numel) if self.config.reference_parity else count_zeros(numel, ratio)
        for piece in self.pieces:
            piece.factor, piece.protected = 1.0, None
        if self.config.balance_experts and self.config.criterion != "movement":
            self._balance_experts()
        if self.config.granularity == "2:4":
            for index, piece in enumerate(self.pieces):
                piece.protected = best_two_of_four(self._score(index, slice(0, piece.stop - piece.start)))
        elif self.config.min_keep:
            self._protect_best()
        return select_(keep, self._score, zeros, reference=self.config.reference_parity)

    def _score(self, index: int, part: slice) -> Tensor:
        piece = self.pieces[index]
        scores = self.statistics.score(piece.name, slice(piece.start + part.start, piece.start + part.stop, part.step))
        if piece.factor != 1:
            scores.mul_(piece.factor)
        return scores if piece.protected is None else scores.masked_fill_(piece.protected[part], math.inf)

    def _score_of_one(self, index: int, _: int, part: slice) -> Tensor:
        return self._score(index, part)

    def _balance_experts(self) -> None:
        stacks: dict[str, list[int]] = {}
        for index, piece in enumerate(self.pieces):
            stacks.setdefault(piece.name, []).append(index)
        for stack in stacks.values():
            if len(stack) > 1:
                totals = torch.tensor([self._total(index) for index in stack], dtype=torch.float64)  # (experts,)
                for index, factor in zip(stack, balance_factors(totals).tolist(), strict=True):
                    self.pieces[index].factor = factor

    def _total(self, index: int) -> float:
        piece = self.pieces[index]
        parts = chunks(piece.stop - piece.start, self.statistics.parameters[piece.name].device)
        return sum(float(self._score(index, part).sum(dtype=torch.float64)) for part in parts)

    def _protect_best(self) -> None:
        """Protect the share `min_keep` of every piece: what none of them would lose if there were enough of others."""
        for index, piece in enumerate(self.pieces):
            size = piece.stop - piece.start
            best = torch.ones(size, dtype=torch.bool, device=self.statistics.parameters[piece.name].device)
            select_([best], partial(self._score_of_one, index), size - math.ceil(self.config.min_keep * size))
            piece.protected = best


def _cut(name: str, numel: int, parts: int) -> list[Piece]:
    size = numel // parts
    return [Piece(name, number * size, (number + 1) * size) for number in range(parts)]


class UnitSelection:
    """Selects whole neurons and heads by the mean score of their weights: our own design."""

    def __init__(self, statistics: Statistics, groups: list[UnitGroup]) -> None:
        self.statistics, self.groups = statistics, groups
        names: dict[Tensor, str] = {parameter: name for name, parameter in statistics.parameters.items()}
        # Of each group: rows of the readers' weights and biases, and columns of the writer.
        self.rows = [[names[p] for r in group.readers for p in r.parameters(recurse=False)] for group in groups]
        self.columns = [names[group.writer.weight] for group in groups]

    def select_(self, masks: Mapping[str, Tensor], ratio: float) -> Selection:
        """Mark the units that are kept, as many as come nearest to this ratio of the weights."""
        scores, sizes = zip(*(self._score_units(index) for index in range(len(self.groups))), strict=True)
        for score in scores:
            score[score.argmax()] = math.inf  # a layer keeps its best unit
        order = torch.cat(scores).argsort(stable=True)  # (units,)
        ordered = torch.cat(scores)[order]  # (units,)
        removed = torch.cat([torch.zeros(1, device=order.device), torch.cat(sizes)[order].cumsum(0)])  # (units + 1,)
        removed[1:][ordered.isinf()] = math.inf
        count = int((removed - (1 - ratio) * _total_of(sizes)).abs().argmin())
        keep = torch.ones_like(order, dtype=torch.bool)
        keep[order[:count]] = False
        parts = keep.split([len(score) for score in scores])
        revived = sum(self._expand_(masks, index, kept) for index, kept in enumerate(parts))
        return Selection(float(ordered[count]), revived, emptied=0)

    def _score_units(self, index: int) -> tuple[Tensor, Tensor]:
        """Mean score of each unit of a group, and how many weights it has. Shapes `(units,)`."""
        group = self.groups[index]
        total = torch.zeros(group.num_units, device=group.writer.weight.device)
        numel = 0
        for name in self.rows[index]:
            scores = self._all(name).view(group.num_units, -1)  # (units, weights)
            total += scores.sum(1)
            numel += scores.shape[1]
        scores = self._all(self.columns[index]).view(-1, group.num_units, group.unit_size)  # (out, units, unit_size)
        total += scores.sum((0, 2))
        numel += scores.shape[0] * scores.shape[2]
        return total / numel, torch.full_like(total, numel, dtype=torch.float64)

    def _all(self, name: str) -> Tensor:
        return self.statistics.score(name, slice(0, self.statistics.parameters[name].numel()))

    def _expand_(self, masks: Mapping[str, Tensor], index: int, kept: Tensor) -> int:
        """Write what is kept of a group to the masks of its parameters; return how many weights are kept anew."""
        group, revived = self.groups[index], 0
        rows = [(masks[name].view(group.num_units, -1), kept[:, None]) for name in self.rows[index]]
        columns = masks[self.columns[index]].view(-1, group.num_units, group.unit_size)
        for mask, new in [*rows, (columns, kept[None, :, None])]:
            revived += int(torch.count_nonzero(new > mask))
            mask.copy_(new.expand_as(mask))
        return revived


def _total_of(sizes: tuple[Tensor, ...]) -> float:
    return float(torch.cat(sizes).sum())
