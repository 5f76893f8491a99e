"""The experiment: many runs of `dare train`, one table."""
