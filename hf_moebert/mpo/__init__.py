"""Matrix product operators: compress pre-trained models, and fine-tune only their small tensors."""

from .configuration_squeezing import MPOSqueezingConfig
from .configuration_tuner import MPOConfig
from .modeling_compression import compress_mpo
from .modeling_tuner import MPOModel
from .training import MPOSqueezingCallback


__all__ = ["MPOConfig", "MPOModel", "MPOSqueezingCallback", "MPOSqueezingConfig", "compress_mpo"]
