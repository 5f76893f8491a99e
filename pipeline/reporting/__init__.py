"""What an HTML page of this program looks like, and the charts on it."""
