"""Answers of an exported model: without the training program, the run and the data set that it was made of."""
