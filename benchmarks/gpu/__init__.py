"""What a machine with a GPU must show: `make check-gpu`."""
