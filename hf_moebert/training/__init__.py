"""Training: what the callbacks and Trainers of several methods share."""
