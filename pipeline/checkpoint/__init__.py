"""Checkpoints: written in the background, whole or not at all, and loaded on any number of ranks."""
