from .conversion import shrink as shrink
from .recipe import PlatonConfig as PlatonConfig
from .training import PlatonPruningCallback as PlatonPruningCallback
from .training_zeros import KeepZerosCallback as KeepZerosCallback
