"""Measuring: footprint, latency, scores, and the comparison of models."""
