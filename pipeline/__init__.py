"""Data to a trained model: ingest, stream, train, evaluate."""
