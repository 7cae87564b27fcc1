"""modicum: language models on a modest budget."""

__version__ = "0.1.0"
