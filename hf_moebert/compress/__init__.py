"""The door: stages of a compression, over all methods."""
