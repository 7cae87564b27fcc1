"""Room pipeline: stages of work under one recipe, one budget and one run directory; see `pipeline.stage`."""
