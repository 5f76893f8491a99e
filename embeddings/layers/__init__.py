"""What models are made of: scores, projections, pooling, MLPs."""
