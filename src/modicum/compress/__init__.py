"""Room compress."""
