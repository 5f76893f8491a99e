"""dare as torchx jobs: components, nodes, schedulers, and torchx's commands."""
