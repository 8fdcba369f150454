from .configuration_distillation import DistillationConfig
from .training import DistillationTrainer


__all__ = ["DistillationConfig", "DistillationTrainer"]
