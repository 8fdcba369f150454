from .conversion import from_dense as from_dense, shrink as shrink
from .recipe import MaskSparsityConfig as MaskSparsityConfig
from .training import MaskSparsityCallback as MaskSparsityCallback
