"""What is true of a family of models, and the surgery on it."""
