"""Architectures: one row for each family of models, and the surgery that reads it."""
