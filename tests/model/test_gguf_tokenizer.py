"""Tokenizers from GGUF metadata: the same tokens as the tokenizer that was written, and as llama.cpp reads there."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import gguf
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from modicum.core.errors import UserError
from modicum.core.gguf import tokenizer as tokens_of
from modicum.data.tokenizer import Tokenizer

TEXT = (
    "Hello world, 2024 is  100% fun!\n\n\tdef f(x):\n    return ünïcödé 日本語 😀 I'll can't WE'RE it's\r\n"
    " a1b22c333 x=1_000;  <|end|> HTTPServer's don'T ½ ² trailing  "
)
SPECIALS = ["<|end|>", "<|start|>"]


def write(path: Path, kind: str, texts: list[str], types: list[int], **keys: object) -> Path:
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model(kind)
    writer.add_token_list(texts)
    writer.add_token_types(types)
    for key, value in keys.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string, list: writer.add_array}
        add[type(value)](f"tokenizer.ggml.{key}" if key != "chat_template" else "tokenizer.chat_template", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def byte_level(path: Path, pre: str) -> tuple[Path, tokenizers.Tokenizer]:
    """A byte-level BPE trained with the splits of `pre`, and its file."""
    backend = tokenizers.Tokenizer(models.BPE(ignore_merges=pre in tokens_of.WHOLE_WORDS))
    splits = [pre_tokenizers.Split(tokenizers.Regex(split), "isolated") for split in tokens_of.SPLITS[pre]]
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=450, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([TEXT, "the cat sat on the mats in 2024, 20 of 24 can't"] * 3, trainer)
    vocabulary = sorted(backend.get_vocab().items(), key=lambda item: item[1])
    merges = [" ".join(merge) for merge in json.loads(backend.to_str())["model"]["merges"]]
    types = [3 if text in SPECIALS else 1 for text, _ in vocabulary]
    texts = [text for text, _ in vocabulary]
    more = {"pre": pre, "merges": merges, "eos_token_id": 0, "bos_token_id": 1, "chat_template": "{{ bos_token }}!"}
    return write(path, "gpt2", texts, types, **more), backend


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "dbrx", "qwen2", "tekken", "gpt-4o"])
def test_byte_level_vocabularies(pre: str, tmp_path: Path) -> None:
    path, backend = byte_level(tmp_path / "m.gguf", pre)
    read = Tokenizer.load(path)
    assert read.encode(TEXT) == backend.encode(TEXT).ids
    assert read.decode(read.encode(TEXT), skip_special=False) == TEXT
    assert (read.eos_token, read.bos_token, read.stop_ids) == ("<|end|>", "<|start|>", (0,))
    assert read.chat([]) == "<|start|>!"
    assert read.encode("a <|end|>", specials=False)[-1] != 0
    other = "gpt-2" if pre != "gpt-2" else "smollm"  # a near miss: another way to split
    assert [s for s, _ in backend.pre_tokenizer.pre_tokenize_str(TEXT)] != [
        s for s, _ in byte_level(tmp_path / "o.gguf", other)[1].pre_tokenizer.pre_tokenize_str(TEXT)
    ]


def sentencepiece(path: Path, prefix: bool) -> tuple[Path, dict[str, float]]:
    words = ["▁the", "▁th", "he", "▁t", "th", "er", "▁ther", "in", "▁in", "ing", "▁▁", "▁▁▁", "▁▁▁▁", "▁x"]
    spaces = {"▁▁": "  ", "▁▁▁": "   ", "▁▁▁▁": "    "}  # as llama.cpp's converter spells them
    letters = list("▁theringxab.")
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *words, *letters]
    types = [2, 3, 3, *[6] * 256, *(4 if w in spaces else 1 for w in words), *[1] * len(letters)]
    # Scores in another order than the tokens: it is the score that decides.
    scores = [0.0] * 259 + [-float(5 * i % 14 + 1) for i in range(len(words))] + [-100.0] * len(letters)
    stored = [spaces.get(text, text) for text in texts]
    more = {"scores": scores, "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, "add_space_prefix": prefix}
    return write(path, "llama", stored, types, **more), dict(zip(texts, scores, strict=True))


def merged(text: str, scores: dict[str, float], prefix: bool) -> list[str]:
    """SentencePiece's rule: join the neighbours of the best score, the first among equals, until none is a token."""
    parts = list(("▁" if prefix else "") + text.replace(" ", "▁"))
    while True:
        pairs = [(scores[a + b], -i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in scores]
        if not pairs:
            break
        i = -max(pairs)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return [p for part in parts for p in ([part] if part in scores else [f"<0x{b:02X}>" for b in part.encode()])]


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_vocabularies(prefix: bool, tmp_path: Path) -> None:
    path, scores = sentencepiece(tmp_path / "m.gguf", prefix)
    read = Tokenizer.load(path)
    for text in ("the there in thing", "ether the é rain.", "xthx ab", "thethethe"):
        got = [read.backend.id_to_token(i) for i in read.encode(text)]
        assert got == merged(text, scores, prefix), text
        assert read.decode(read.encode(text)) == text
    assert read.encode("the", add_special=True)[0] == 1, "a bos where the file says nothing of it"
    indented = [read.backend.id_to_token(i) for i in read.encode("a    the")]
    assert "▁▁▁▁" in indented, "user-defined tokens come before the better score of ▁the"


def test_llama_cpp_reads_the_same_tokens(tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    paths = [byte_level(tmp_path / f"{pre}.gguf", pre)[0] for pre in ("gpt-2", "smollm", "llama-bpe", "qwen2")]
    paths += [sentencepiece(tmp_path / f"{prefix}.gguf", prefix)[0] for prefix in (True, False)]
    for path in paths:
        theirs = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
        ours = Tokenizer.load(path)
        texts = (TEXT, "the    there in  thing", " x", "ab  the", "the there é in ether <s>x")
        # With a prefix it puts one behind every user-defined token too, which runs of spaces are in this vocabulary.
        for text in texts if path.name != "True.gguf" else [t for t in texts if "  " not in f" {t}"]:
            want = theirs.tokenize(text.encode(), add_bos=True, special=True)
            assert ours.encode(text, add_special=True) == want, (path.name, text)
        theirs.close()


def test_what_is_not_read_is_one_line(tmp_path: Path) -> None:
    path, _ = byte_level(tmp_path / "m.gguf", "gpt-2")
    data = path.read_bytes()
    for name, old, new, words in (
        ("pre", b"gpt-2", b"gpt-7", "did you mean 'gpt-2'"),
        ("kind", b"\x04\0\0\0\0\0\0\0gpt2", b"\x04\0\0\0\0\0\0\0bert", "tokenizer.ggml.model"),
    ):
        broken = tmp_path / f"{name}.gguf"
        broken.write_bytes(data.replace(old, new))
        with pytest.raises(UserError, match=f"(?i){words}") as caught:
            Tokenizer.load(broken)
        assert "\n" not in str(caught.value)
