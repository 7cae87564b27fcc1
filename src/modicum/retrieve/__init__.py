"""Room retrieve."""
