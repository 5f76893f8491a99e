"""The K best-scored behaviours of each window, as one operator for CPU and CUDA."""
