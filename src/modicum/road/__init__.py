"""Room road."""
