"""Exact metrics of an evaluation over all ranks, and what TensorBoard draws of its scores."""
