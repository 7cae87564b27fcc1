"""Stand-ins for the published models of a recipe: random weights in the formats that their makers publish."""

from pathlib import Path

import torch

from modicum.data.tokenizer import Tokenizer

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def corpus(folder: Path, *modules: str) -> Path:
    """Source files of the standard library."""
    folder.mkdir()
    for name in modules:
        (folder / f"{name}.py").write_text(Path(__import__(name).__file__ or "").read_text())
    return folder


def chat_model(folder: Path, texts: list[str]) -> Path:
    """A random Llama of two layers with a chat template."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = Tokenizer.train(texts, 600)
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=640,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(shape).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def encoder(folder: Path, texts: list[str]) -> Path:
    """A random BERT of one layer, pooled by the mean, as sentence-transformers stores one."""
    from transformers import BertConfig, BertModel, BertTokenizer

    folder.mkdir()
    words = sorted({w for t in texts for w in t.lower().split() if w.isalpha()})[:2000]
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    shape = BertConfig(
        vocab_size=len(words) + 5, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    BertModel(shape).save_pretrained(folder)
    return folder
