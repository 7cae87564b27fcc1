"""Room data: documents, curation, tokenizer, token shards, and the training stream over them."""
