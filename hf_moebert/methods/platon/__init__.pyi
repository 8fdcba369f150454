from .conversion import shrink as shrink
from .recipe import PlatonConfig as PlatonConfig
from .training import PlatonPruningCallback as PlatonPruningCallback
