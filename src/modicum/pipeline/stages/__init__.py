"""The stages of the road, one file each; see `modicum.pipeline`."""
