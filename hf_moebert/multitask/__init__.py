"""Many tasks on one frozen BERT: a trunk that runs once, and a short branch for every task."""

from .configuration_recipe import SweepConfig
from .modeling_multitask import MultiTaskBertModel
from .modeling_pipeline import MultiTaskPipeline
from .training import MultiTaskSweep, SweepTask


__all__ = [
    "MultiTaskBertModel",
    "MultiTaskPipeline",
    "MultiTaskSweep",
    "SweepConfig",
    "SweepTask",
]
