"""Room laws."""
