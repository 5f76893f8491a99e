"""What models are made of: scores, maps, pooling, perceptrons, hashes."""
