from .configuration_tuner import MPOConfig as MPOConfig
from .conversion import compress_mpo as compress_mpo, to_dense as to_dense
from .modeling_tuner import MPOModel as MPOModel
from .recipe import MPOSqueezingConfig as MPOSqueezingConfig
from .training import MPOSqueezingCallback as MPOSqueezingCallback
