"""A model that learns day by day, and is measured on each day before it learns it."""
