"""Training: the loop, what it agrees on over ranks, what it shows."""
