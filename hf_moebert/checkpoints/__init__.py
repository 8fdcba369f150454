"""Checkpoints: loading them whole, packing them, and finding the last complete one."""
