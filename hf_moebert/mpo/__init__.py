"""Matrix product operators: compress pre-trained models, and fine-tune only their small tensors."""

from .configuration_squeezing import MPOSqueezingConfig
from .configuration_tuner import MPOConfig
from .modeling_compression import compress_mpo
from .training_squeezing import MPOSqueezingCallback
from .training_tuner import MPOModel


__all__ = ["MPOConfig", "MPOModel", "MPOSqueezingCallback", "MPOSqueezingConfig", "compress_mpo"]
