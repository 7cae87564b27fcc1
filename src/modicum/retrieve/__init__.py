"""Room retrieve: BM25, text encoders, vector indexes, fusion, grounded answers, retrieval metrics."""
