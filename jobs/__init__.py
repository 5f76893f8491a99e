"""What a person or a cluster starts: the `dare` command line and the torchx components. Thin."""
