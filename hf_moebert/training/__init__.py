"""Training: schedules and checks that several methods share."""
