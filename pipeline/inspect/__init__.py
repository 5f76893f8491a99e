"""What is in a data set: numbers and a figure, read row group by row group."""
