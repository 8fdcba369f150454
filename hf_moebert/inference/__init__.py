"""Inference: run a finished model faster on the machine it is on."""
