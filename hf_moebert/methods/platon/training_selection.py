"""Selectors that turn scores into masks of weights or whole units."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .conversion_plan import fewest_units
from .functional import chunks
from .functional_selection import Selection, balance_factors, best_two_of_four, count_zeros, keep_largest_
from .modeling_surgery import output_dim
from .modeling_units import UnitGroup
from .training_statistics import Statistics, UnitStatistics


@dataclass
class Piece:
    """A parameter, or one expert of a stack, whose scores share a factor and a floor.

    Attributes:
        name: Name of the parameter.
        start: First element of the piece, of those that are in this process.
        stop: The element after its last.
        total: Elements of the piece in all processes.
        factor: Multiplier of its scores, which makes experts count alike.
        protected: True where a weight is kept whatever its score. Shape `(stop - start,)`.
    """

    name: str
    start: int
    stop: int
    total: int
    factor: float = 1.0
    protected: Tensor | None = None

    def __len__(self) -> int:
        return self.stop - self.start


class WeightSelector:
    """A selector of single weights over all parameters together, or of two of every four.

    Attributes:
        sizes: Of each parameter that gets a mask, the number of weights that the mask stands for, in all processes.
    """

    def __init__(self, statistics: Statistics) -> None:
        self.statistics, self.config = statistics, statistics.config
        self.sizes = {name: parameter.numel() for name, parameter in statistics.parameters.items()}
        self.pieces: list[Piece] = []
        for name, parameter in statistics.parameters.items():
            experts = len(parameter) if parameter.dim() == 3 else 1
            size, here = parameter.numel() // experts, statistics.parts[name]
            for first in range(0, parameter.numel(), size):
                start, stop = (min(max(at, here.start), here.stop) - here.start for at in (first, first + size))
                self.pieces.append(Piece(name, start, stop, size))

    def update_masks_(self, masks: Mapping[str, Tensor], ratio: float) -> Selection:
        """Mark the weights that are kept at this ratio."""
        keep = [masks[piece.name][piece.start : piece.stop] for piece in self.pieces]
        numel = sum(self.sizes.values())
        parity = self.config.reference_parity
        zeros = int((1 - ratio) * numel) if parity else count_zeros(numel, ratio)
        for piece in self.pieces:
            piece.factor, piece.protected = 1.0, None
        if self.config.balance_experts and self.config.criterion != "movement":
            self._balance_experts()
        if self.config.granularity == "2:4":
            for piece in self.pieces:
                piece.protected = best_two_of_four(self._score(piece, slice(0, len(piece))))
        elif self.config.min_keep:
            self._protect_best()
        processes = self.statistics.processes
        return keep_largest_(keep, self._score_by_index, zeros, reference_parity=parity, processes=processes)

    def _score_by_index(self, index: int, part: slice) -> Tensor:
        return self._score(self.pieces[index], part)

    def _score(self, piece: Piece, part: slice) -> Tensor:
        scores = self.statistics.score(piece.name, slice(piece.start + part.start, piece.start + part.stop, part.step))
        if piece.factor != 1:
            scores.mul_(piece.factor)
        return scores if piece.protected is None else scores.masked_fill_(piece.protected[part], math.inf)

    def _balance_experts(self) -> None:
        """Scale the scores so that all experts of a stack have the same total."""
        stacks: dict[str, list[Piece]] = {}
        for piece in self.pieces:
            stacks.setdefault(piece.name, []).append(piece)
        for stack in stacks.values():
            if len(stack) > 1:
                device = self.statistics.parameters[stack[0].name].device
                sums = torch.tensor([self._sum_scores(piece) for piece in stack], dtype=torch.float64, device=device)
                totals = self.statistics.processes.add(sums)  # (experts,)
                for piece, factor in zip(stack, balance_factors(totals).tolist(), strict=True):
                    piece.factor = factor

    def _sum_scores(self, piece: Piece) -> float:
        parts = chunks(len(piece), self.statistics.parameters[piece.name].device)
        return sum(float(self._score(piece, part).sum(dtype=torch.float64)) for part in parts)

    def _protect_best(self) -> None:
        """Protect the best share `min_keep` of every piece."""
        for piece in self.pieces:
            best = torch.ones(len(piece), dtype=torch.bool, device=self.statistics.parameters[piece.name].device)

            def score_of_piece(_: int, part: slice, piece: Piece = piece) -> Tensor:
                return self._score(piece, part)

            zeros = piece.total - math.ceil(self.config.min_keep * piece.total)
            keep_largest_([best], score_of_piece, zeros, processes=self.statistics.processes)
            piece.protected = best


class UnitSelector:
    """A selector of whole neurons and heads by the mean score of their weights: our own design.

    Masks hold the columns of the writers alone. They are what silences a unit, and they still get a gradient through
    its rows, so that the unit can come back; with the rows at zero, too, neither would.

    Attributes:
        sizes: Of each writer, the number of weights of its units.

    Raises:
        ValueError: If `keep_ratio` is less than the share of the units that stay in any case.
    """

    def __init__(self, statistics: UnitStatistics) -> None:
        self.statistics, self.config, self.groups = statistics, statistics.config, statistics.groups
        self.sizes = dict(zip(statistics.columns, statistics.numels, strict=True))
        self._check_floor()

    def _check_floor(self) -> None:
        ratio, share = self.config.keep_ratio, self.config.min_keep
        sizes = zip(self.groups, self.sizes.values(), strict=True)
        least = sum(fewest_units(group, share) * (size // group.num_units) for group, size in sizes)
        smallest = least / sum(self.sizes.values())
        if ratio < smallest:
            kept = f"`min_keep`, {share}, of its neurons and heads" if share else "its best neuron and head"
            remedy = "a smaller `min_keep`" if share else "prune single weights"
            raise ValueError(
                f"`keep_ratio` must be at least {math.ceil(smallest * 1e4) / 1e4} with granularity 'structured', got"
                f" {ratio}: every layer keeps {kept}, which are that much of this model. Keep more, or {remedy}."
            )

    def update_masks_(self, masks: Mapping[str, Tensor], ratio: float) -> Selection:
        """Mark the units that are kept, as many as come closest to this ratio of the weights."""
        scores, sizes = self.statistics.score_units(), self.unit_sizes()
        for group, score in zip(self.groups, scores, strict=True):  # every layer keeps its best units
            score[score.argsort(descending=True, stable=True)[: fewest_units(group, self.config.min_keep)]] = math.inf
        order = torch.cat(scores).argsort(stable=True)  # (units,)
        ordered = torch.cat(scores)[order]  # (units,)
        numel = torch.cat([torch.full_like(s, n, dtype=torch.float64) for s, n in zip(scores, sizes, strict=True)])
        removed = torch.cat([torch.zeros(1, device=order.device), numel[order].cumsum(0)])  # (units + 1,)
        removed[1:][ordered.isinf()] = math.inf
        count = int((removed - (1 - ratio) * float(numel.sum())).abs().argmin())
        keep = torch.ones_like(order, dtype=torch.bool)
        keep[order[:count]] = False
        revived = self._write_masks_(masks, keep.split([len(score) for score in scores]))
        return Selection(float(ordered[count]), revived, emptied=0)

    def unit_sizes(self) -> list[int]:
        """Return the number of weights of a unit of each group."""
        return [size // group.num_units for group, size in zip(self.groups, self.sizes.values(), strict=True)]

    def _columns_by_unit(self, group: UnitGroup, values: Tensor) -> Tensor:
        """View one value for each weight of a writer as `(out, units, unit_size)`."""
        rows = values.movedim(output_dim(group.writer, values), 0)  # (out, in)
        return rows.unflatten(1, (group.num_units, group.unit_size))

    def _write_masks_(self, masks: Mapping[str, Tensor], kept: Sequence[Tensor]) -> int:
        """Write the kept units of each group to the mask of its writer; return the number of revived weights."""
        revived = []
        for group, name, units in zip(self.groups, self.sizes, kept, strict=True):
            whole = torch.empty(self.statistics.parameters[name].shape, dtype=torch.bool, device=units.device)
            columns = self._columns_by_unit(group, whole)  # (out, units, unit_size)
            columns.copy_(units[None, :, None].expand_as(columns))
            mask = whole.view(-1)[self.statistics.parts[name]]
            revived.append(torch.count_nonzero(mask & ~masks[name]) * group.num_units / whole.numel())
            masks[name].copy_(mask)
        units_by_group = self.statistics.processes.add(torch.stack(revived)).tolist()
        return sum(round(units) * size for units, size in zip(units_by_group, self.unit_sizes(), strict=True))
