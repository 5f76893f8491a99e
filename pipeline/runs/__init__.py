"""The folder of a run: documents, checkpoints, how it is doing, runs side by side."""
