"""A tiny language model on disk for the retrieval tests."""

from pathlib import Path

import torch

from modicum.data.tokenizer import Tokenizer

TEXTS = [
    "the cat sat on the mat",
    "a dog chased the cat",
    "json.loads parses a JSON string",
    "",
    "serialize an object to a JSON string",
    "the dog sat",
    "open a file and read its lines " * 8,
]


def random_llama(folder: Path, context: int = 64) -> Path:
    """Made by transformers, with a tokenizer trained on `TEXTS`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = Tokenizer.train(TEXTS, 300)
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=tokenizer.vocab_size,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=context,
            eos_token_id=tokenizer.eos_id,
        )
    ).save_pretrained(folder)
    tokenizer.save(folder)
    return folder


def plain_modules(folder: Path) -> None:
    """Declare a transformer with mean pooling, as sentence-transformers does."""
    import json

    kinds = ("Transformer", "Pooling")
    modules = [
        {"idx": i, "path": p, "type": f"sentence_transformers.models.{kinds[i]}"} for i, p in enumerate(("", "1_P"))
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_P").mkdir()
    (folder / "1_P" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
