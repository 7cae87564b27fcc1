"""Room compress: quantised copies of a stored model, GGUF export, and general-purpose compressors as baselines."""
