"""The selector of whole units within a budget of time."""

from collections.abc import Mapping

import torch
from torch import Tensor

from hf_moebert.architectures.protocols import UnitCosts

from .conversion_plan import Budget, plan_widths, time_budget
from .functional_selection import Selection
from .training_selection import UnitSelector
from .training_statistics import UnitStatistics


MULTIPLE_OF = 8  # neurons of each layer


class TimedUnitSelector(UnitSelector):
    """A selector of the units with the largest total score that run in a share of the dense model's time.

    The knapsack of scores over the costs of a latency table is solved exactly: our own design.

    Args:
        statistics: Running statistics of the units.
        latency: What they cost, from `measure_unit_latency`.

    Raises:
        ValueError: If the table is not of this model, or `speed_up` cannot be reached.
    """

    def __init__(self, statistics: UnitStatistics, latency: UnitCosts) -> None:
        self.latency = latency
        super().__init__(statistics)

    def _check_floor(self) -> None:
        speed_up, min_keep = self.config.speed_up, self.config.min_keep
        self.costs = time_budget(self.groups, self.latency, speed_up=speed_up, min_keep=min_keep).costs

    def update_masks_(self, masks: Mapping[str, Tensor], ratio: float) -> Selection:
        """Mark the best units that take at most this share of the time."""
        ranked = [score.sort(descending=True, stable=True) for score in self.statistics.score_units()]
        values = [
            (score.double() * numel).cumsum(0).cpu()
            for (score, _), numel in zip(ranked, self.unit_sizes(), strict=True)
        ]
        budget = Budget(self.costs, ratio - self.latency.smallest)
        widths = plan_widths(self.groups, values, budget, multiple_of=MULTIPLE_OF, min_keep=self.config.min_keep)
        kept, threshold = [], torch.inf
        for (score, order), width in zip(ranked, widths, strict=True):
            kept.append(torch.zeros_like(order, dtype=torch.bool))
            kept[-1][order[:width]] = True
            threshold = min(threshold, float(score[width - 1]))
        return Selection(threshold, self._write_masks_(masks, kept), emptied=0)
