"""Mixture of Masks: learned masks on the activations of feed-forward networks instead of experts."""

from .configuration_recipe import MaskSparsityConfig
from .modeling_conversion import add_masks, compact
from .training import MaskSparsityCallback


__all__ = ["MaskSparsityCallback", "MaskSparsityConfig", "add_masks", "compact"]
