"""What ids mean that no log says."""

UNKNOWN = 0
"""Dense id of everything that is unknown, missing or padding. Row 0 of every embedding table."""
