"""Timings as ratios of two sides that compute the same thing, measured side by side in one run."""
