"""tokenizer.json from a GGUF file's metadata, for the two kinds of vocabulary that language models have there.

`tokenizer.ggml.model` names the kind. "gpt2" is byte-level BPE: merges are stored, and `tokenizer.ggml.pre` names
one of llama.cpp's ways to cut text before merging (`SPLITS`: the regular expressions in its `llama-vocab.cpp` and in
the models' own tokenizer.json). "llama" is SentencePiece's BPE: neighbours whose joined text has the highest score
are merged, so the merges are every way to write a token as two, best token first.
"""

from __future__ import annotations

from typing import Any

from modicum.core.errors import UserError, unknown
from modicum.core.gguf import GgufFile

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = r"[^\r\n\p{L}\p{N}]?" + _UPPER + "*" + _LOWER + "+@|" + r"[^\r\n\p{L}\p{N}]?" + _UPPER + "+" + _LOWER + "*@"
_SLASHES = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
QWEN2 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST
TEKKEN = _CASED.replace("@", "") + r"|\p{N}" + _SLASHES
GPT4O = _CASED.replace("@", CONTRACTIONS + "?") + r"|\p{N}{1,3}" + _SLASHES
#: `tokenizer.ggml.pre` to regular expressions, each applied to what the one before has cut.
SPLITS = {
    **dict.fromkeys(("gpt-2", "gpt2", "phi-2", "mpt", "olmo", "jais", "roberta-bpe", "exaone4"), (GPT2,)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), (r"\p{N}", GPT2)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "dbrx", "smaug-bpe"), (LLAMA3,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez", "kormo", "hunyuan"), (QWEN2,)),
    "tekken": (TEKKEN,),
    **dict.fromkeys(("gpt-4o", "llama4"), (GPT4O,)),
}  # fmt: skip
#: Names under which a word that is a token is kept whole, whatever its merges say, and a prompt gets a bos by default.
WHOLE_WORDS = ("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "tekken")
#: Names whose models bring text to NFC first.
NFC = ("qwen2", "deepseek-r1-qwen", "megrez", "kormo")


def tokenizer_of(file: GgufFile) -> Any:
    """The `tokenizers.Tokenizer` that the metadata describes. Raises `UserError` for kinds that are not read."""
    from tokenizers import AddedToken

    kind = file.require("tokenizer.ggml.model")
    kinds = {"gpt2": _byte_level, "llama": _sentencepiece}
    if kind not in kinds:
        raise unknown(f"tokenizer.ggml.model in {file.path}", kind, kinds)
    texts = _texts(file)
    types = file.metadata.get("tokenizer.ggml.token_type") or [NORMAL] * len(texts)
    if len(types) != len(texts):
        raise UserError(f"{file.path} has {len(texts)} tokens and {len(types)} token types; convert it again")
    backend = kinds[kind](file, texts, types)
    added = [
        AddedToken(text, normalized=False, special=type_ != USER_DEFINED)
        for text, type_ in zip(texts, types, strict=True)
        if type_ in (CONTROL, USER_DEFINED) or (type_ == UNKNOWN and kind == "llama")
    ]
    backend.add_tokens([token for token in added if not token.special])
    backend.add_special_tokens([token for token in added if token.special])
    _add_ends(backend, file, texts, kind)
    return backend


def tokenizer_settings(file: GgufFile) -> dict[str, Any]:
    """tokenizer_config.json: the special tokens by name, and what is put around a prompt."""
    texts, settings = _texts(file), {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        number = file.metadata.get(f"tokenizer.ggml.{key}_token_id")
        settings[f"{name}_token"] = texts[number] if number is not None and number < len(texts) else None
    bos, eos = _ends(file)
    length = file.metadata.get(f"{file.architecture}.context_length")
    return settings | {
        "add_bos_token": bos,
        "add_eos_token": eos,
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
        **({"model_max_length": length} if length else {}),
    }


def stop_ids(file: GgufFile) -> list[int]:
    """Tokens that end an answer: the end of text, and the end of a turn where that is another."""
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    ids = [file.metadata.get(f"tokenizer.ggml.{key}") for key in keys]
    # Files made before there was a key for the end of a turn: llama.cpp knows it by these names.
    texts = file.metadata.get("tokenizer.ggml.tokens", ())
    index = {text: i for i, text in enumerate(texts)}
    ids += [index.get(text) for text in ("<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<|end|>")]
    return list(dict.fromkeys(i for i in ids if i is not None))


def _texts(file: GgufFile) -> list[str]:
    """Tokens as tokenizer.json writes them: llama.cpp's files spell some runs of SentencePiece's spaces as spaces."""
    texts: list[str] = file.require("tokenizer.ggml.tokens")
    if file.require("tokenizer.ggml.model") != "llama":
        return texts
    return ["▁" * len(text) if text and not text.strip(" ") else text for text in texts]


def _ends(file: GgufFile) -> tuple[bool, bool]:
    """Whether bos and eos are put around a prompt. Without a key, SentencePiece's and Llama 3's get a bos."""
    default = file.require("tokenizer.ggml.model") == "llama" or file.metadata.get("tokenizer.ggml.pre") in WHOLE_WORDS
    bos, eos = (file.metadata.get(f"tokenizer.ggml.add_{name}_token") for name in ("bos", "eos"))
    return bool(default if bos is None else bos), bool(eos)


def _add_ends(backend: Any, file: GgufFile, texts: list[str], kind: str) -> None:
    """Let the tokenizer put bos and eos where the file asks for them."""
    from tokenizers import processors

    metadata = file.metadata
    steps: list[Any] = []
    ends = [
        (texts[number], number) if wanted and number is not None else None
        for wanted, number in zip(
            _ends(file),
            (metadata.get("tokenizer.ggml.bos_token_id"), metadata.get("tokenizer.ggml.eos_token_id")),
            strict=True,
        )
    ]
    if kind == "gpt2":
        steps.append(processors.ByteLevel(trim_offsets=False))
    if any(ends):
        bos, eos = ([f"{end[0]}:{{}}"] if end else [] for end in ends)
        template = [*bos, "$A:{}", *eos]
        steps.append(
            processors.TemplateProcessing(
                single=[item.format(0) for item in template],
                pair=[item.format(0) for item in template] + [item.replace("$A", "$B").format(1) for item in template],
                special_tokens=list(dict.fromkeys(end for end in ends if end)),
            )
        )
    if steps:
        backend.post_processor = steps[0] if len(steps) == 1 else processors.Sequence(steps)


def _byte_level(file: GgufFile, texts: list[str], types: list[int]) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    name = file.metadata.get("tokenizer.ggml.pre", "gpt-2")
    name = "gpt-2" if name == "default" else name
    if name not in SPLITS:
        raise unknown(f"tokenizer.ggml.pre in {file.path}", name, SPLITS)
    merges = [tuple(merge.split(" ")) for merge in file.require("tokenizer.ggml.merges")]
    vocabulary = {text: i for i, text in enumerate(texts)}
    model = models.BPE(vocabulary, _pairs(merges, file), ignore_merges=name in WHOLE_WORDS)
    backend = Tokenizer(model)
    steps = [pre_tokenizers.Split(Regex(split), "isolated") for split in SPLITS[name]]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    if name in NFC:
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    return backend


def _pairs(merges: list[tuple[str, ...]], file: GgufFile) -> list[tuple[str, str]]:
    wrong = next((merge for merge in merges if len(merge) != 2), None)
    if wrong is not None:
        raise UserError(f"{file.path} has a merge {' '.join(wrong)!r} that joins no two tokens; convert it again")
    return [(merge[0], merge[1]) for merge in merges]


def _sentencepiece(file: GgufFile, texts: list[str], types: list[int]) -> Any:
    """Spaces become U+2581; a character that is no token falls back to its bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    unknown_id = file.metadata.get("tokenizer.ggml.unknown_token_id", 0)
    vocabulary = {text: i for i, text in enumerate(texts)}
    model = models.BPE(
        vocabulary,
        _implied_merges(file, texts, types, vocabulary),
        unk_token=texts[unknown_id] if unknown_id < len(texts) else None,
        fuse_unk=True,
        byte_fallback=True,
    )
    backend = Tokenizer(model)
    prefix = bool(file.metadata.get("tokenizer.ggml.add_space_prefix", True))
    steps = [normalizers.Replace(" ", "▁")]
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *steps]) if prefix else steps[0]
    decoding = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(decoding + ([decoders.Strip(" ", 1, 0)] if prefix else []))
    return backend


def _implied_merges(
    file: GgufFile, texts: list[str], types: list[int], vocabulary: dict[str, int]
) -> list[tuple[str, str]]:
    """Every pair of tokens whose join is a token, best score first; user-defined tokens, which SentencePiece cuts out
    of the text before it merges anything, go before all others."""
    scores = file.require("tokenizer.ggml.scores")
    if len(scores) != len(texts):
        raise UserError(f"{file.path} has {len(texts)} tokens and {len(scores)} scores; convert it again")
    mergeable = [i for i, type_ in enumerate(types) if type_ in (NORMAL, USER_DEFINED)]
    usable = {texts[i] for i in mergeable}
    order = sorted(mergeable, key=lambda i: (types[i] != USER_DEFINED, -scores[i]))
    merges = []
    for i in order:
        text = texts[i]
        pairs = [
            (text[:cut], text[cut:]) for cut in range(1, len(text)) if text[:cut] in usable and text[cut:] in usable
        ]
        pairs.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        merges += pairs
    return merges
