from .configuration_platon import PlatonConfig
from .modeling_shrunk import shrink
from .training import PlatonPruningCallback


__all__ = ["PlatonConfig", "PlatonPruningCallback", "shrink"]
