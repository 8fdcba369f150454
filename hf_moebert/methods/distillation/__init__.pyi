from .recipe import DistillationConfig as DistillationConfig
from .training import DistillationTrainer as DistillationTrainer
