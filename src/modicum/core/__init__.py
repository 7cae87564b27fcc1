"""Room core: registry, choices, capabilities, specs, files, events, errors. Needs pydantic and yaml only."""
