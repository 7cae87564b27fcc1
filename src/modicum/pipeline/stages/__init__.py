"""The stages of recipes, one file each; see `modicum.pipeline.stage`."""
