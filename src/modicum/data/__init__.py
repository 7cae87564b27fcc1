"""Room data: documents, curation tokenizer, token shards, and the stream that trains on them."""
