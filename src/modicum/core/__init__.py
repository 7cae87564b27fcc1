"""Room core: what every other room stands on. Imports the standard library, pydantic and yaml only."""
