from .conversion import shrink as shrink
from .conversion_one_shot import prune_structured as prune_structured
from .recipe import PlatonConfig as PlatonConfig
from .training import PlatonPruningCallback as PlatonPruningCallback
from .training_zeros import KeepZerosCallback as KeepZerosCallback
