from .conversion_layers import choose_layers as choose_layers, drop_layers as drop_layers
