"""Room adapt."""
