"""A model on a split: predictions, exact metrics over all ranks, scores as files."""
