"""Room compress: a stored model in fewer bytes, and general-purpose compressors as its yardstick."""
