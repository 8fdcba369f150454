from .conversion_layers import choose_layers as choose_layers, drop_layers as drop_layers
from .conversion_vocabulary import (
    Splitting as Splitting,
    compare_splitting as compare_splitting,
    trim_vocabulary as trim_vocabulary,
)
