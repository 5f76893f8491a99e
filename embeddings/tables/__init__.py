"""The tables of a model: what is declared, and what is looked up in them for a batch."""
