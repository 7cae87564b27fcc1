"""GGUF, the file that llama.cpp and its relatives run: tensor types, architectures, writing.

Facts from ggml's and llama.cpp's sources (`ggml-common.h`, `docs/gguf.md`, `llama-arch.cpp`): a file is metadata
(keys and values), a list of tensors, and their bytes.
"""
