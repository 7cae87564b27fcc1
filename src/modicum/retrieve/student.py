"""A transformer encoder that is trained for retrieval: new from text, or opened from a folder; saved as one.

Shape letters: N texts, T tokens, D width, V vocabulary, W words of a text.

A new one is raw: its tokenizer is cut to the texts, its layers are random, and its word vectors are the leading
singular directions of the positive pointwise mutual information of words that stand near each other (Levy and
Goldberg 2014), which costs seconds and stands for the pretraining that a small budget cannot pay. One forward pass
gives the states of all layers. The folder is of the sentence-transformers kind: a transformer and one pooling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modicum.core.errors import UserError
from modicum.core.files import write_json

WINDOW = 5  # tokens to either side that count as near
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@dataclass
class States:
    """What a forward pass over N texts gives."""

    layers: list[Tensor]  # h_NTD of every layer, first to last; the embeddings are not among them
    mask_NT: Tensor  # True at tokens, False at padding
    words_NT: Tensor  # number of the word (in order of first occurrence in its text) a token belongs to, -1 for none
    vocabulary_N: list[list[str]]  # the words of each text by their numbers, in lower case
    pooling: str

    def pooled(self, layer: int = -1) -> Tensor:
        """vectors_ND of one layer: the mean over the tokens, or the state of the first."""
        h_NTD = self.layers[layer]
        if self.pooling == "cls":
            return h_NTD[:, 0]
        mask_NT1 = self.mask_NT[..., None].to(h_NTD.dtype)
        return (h_NTD * mask_NT1).sum(1) / mask_NT1.sum(1)


class Student(nn.Module):
    """`Student.new(texts)` or `Student.open(folder)`; calling it on texts gives `States`."""

    def __init__(self, model: Any, tokenizer: Any, pooling: str, max_tokens: int):
        super().__init__()
        if pooling not in ("mean", "cls"):
            raise UserError(f"pooling {pooling!r} is not mean or cls")
        self.model, self.tokenizer, self.pooling, self.max_tokens = model, tokenizer, pooling, max_tokens

    @classmethod
    def new(
        cls,
        texts: Sequence[str],
        *,
        width: int = 256,
        layers: int = 3,
        heads: int = 4,
        vocabulary: int = 8000,
        max_tokens: int = 128,
        pooling: str = "mean",
        seed: int = 0,
    ) -> Student:
        """A raw encoder whose tokenizer and word vectors come from `texts`."""
        from transformers import BertConfig, BertModel

        tokenizer = _tokenizer(texts, vocabulary)
        size = len(tokenizer)
        config = BertConfig(
            vocab_size=size,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=4 * width,
            max_position_embeddings=max_tokens,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = BertModel(config, add_pooling_layer=False)
        rows = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        vectors_VD = word_vectors(rows, size, width, seed)
        with torch.no_grad():
            scale = 0.05 / max(float(np.sqrt((vectors_VD**2).mean())), 1e-12)
            known_V = torch.from_numpy(np.abs(vectors_VD).sum(1) > 0)
            weight_VD = model.embeddings.word_embeddings.weight
            weight_VD[known_V] = torch.from_numpy(scale * vectors_VD)[known_V]
        return cls(model, tokenizer, pooling, max_tokens)

    @classmethod
    def open(cls, folder: str | Path) -> Student:
        """From a folder that is a transformer and one pooling."""
        from transformers import AutoModel, AutoTokenizer

        from modicum.retrieve.encoders._plain import plain_shape

        shape = plain_shape(Path(folder))
        if shape is None:
            raise UserError(f"{folder} is not a transformer with one pooling; give a folder with such a modules.json")
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        model = AutoModel.from_pretrained(str(folder), trust_remote_code=False)
        most = [n for n in (shape[1], getattr(model.config, "max_position_embeddings", None)) if n] or [512]
        return cls(model, tokenizer, shape[0], min(most))

    @property
    def width(self) -> int:
        return int(self.model.config.hidden_size)

    @property
    def depth(self) -> int:
        return int(self.model.config.num_hidden_layers)

    def forward(self, texts: Sequence[str]) -> States:
        inputs = self.tokenizer(
            [t.strip() for t in texts],
            padding=True,
            truncation=True,
            max_length=self.max_tokens,
            return_tensors="pt",
        )
        device = next(self.parameters()).device
        ids_NT, mask_NT = inputs["input_ids"].to(device), inputs["attention_mask"].to(device)
        result = self.model(input_ids=ids_NT, attention_mask=mask_NT, output_hidden_states=True)
        words = [_words(inputs, n, text.strip(), ids_NT.shape[1]) for n, text in enumerate(texts)]
        words_NT = torch.stack([words_T for words_T, _ in words]) if words else torch.empty(ids_NT.shape)
        vocabulary_N = [list(number) for _, number in words]
        layers = list(result.hidden_states[1:])
        return States(layers, mask_NT.bool(), words_NT.to(device), vocabulary_N, self.pooling)

    def encode(self, texts: Sequence[str], batch: int = 64) -> np.ndarray:
        """vectors_ND, float32, of the last layer; not of length 1."""
        parts = [np.empty((0, self.width), np.float32)]
        self.eval()
        with torch.inference_mode():
            for start in range(0, len(texts), batch):
                parts.append(self(texts[start : start + batch]).pooled().float().cpu().numpy())
        return np.concatenate(parts)

    def save(self, folder: str | Path) -> None:
        """A folder that `sentence-transformers:model=FOLDER` opens. The caller makes it atomic."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        kinds = (("", "Transformer"), ("1_Pooling", "Pooling"))
        modules = [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (path, kind) in enumerate(kinds)
        ]
        write_json(folder / "modules.json", modules)
        (folder / "1_Pooling").mkdir(exist_ok=True)
        write_json(
            folder / "1_Pooling" / "config.json",
            {
                "word_embedding_dimension": self.width,
                "pooling_mode_mean_tokens": self.pooling == "mean",
                "pooling_mode_cls_token": self.pooling == "cls",
            },
        )
        write_json(folder / "sentence_bert_config.json", {"max_seq_length": self.max_tokens, "do_lower_case": False})


def _words(inputs: Any, row: int, text: str, width: int) -> tuple[Tensor, dict[str, int]]:
    """words_T, and the number of each word: its tokens, in all its occurrences, letter case aside, have it."""
    words_T = torch.full((width,), -1, dtype=torch.int64)
    number: dict[str, int] = {}
    spans: dict[int, tuple[int, int]] = {}
    ids = inputs.word_ids(row)
    for word in ids:
        if word is not None and word not in spans:
            span = inputs.word_to_chars(row, word)
            spans[word] = (span.start, span.end)
    for t, word in enumerate(ids[:width]):
        if word is not None:
            start, end = spans[word]
            words_T[t] = number.setdefault(text[start:end].strip().casefold(), len(number))
    return words_T, number


def _tokenizer(texts: Sequence[str], vocabulary: int) -> Any:
    """A byte-pair tokenizer with lower-case letters, trained on `texts`; the same texts give the same one."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    ends = [("[CLS]", backend.token_to_id("[CLS]")), ("[SEP]", backend.token_to_id("[SEP]"))]
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=ends
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def word_vectors(rows: Sequence[Sequence[int]], vocabulary: int, width: int, seed: int) -> np.ndarray:
    """vectors_VD: truncated SVD of the positive PMI of tokens within `WINDOW`; zeros for tokens that never occur.

    ppmi(a, b) = max(0, ln(n(a, b) n / (n(a) n(b))))        vectors = U sqrt(S)
    """
    from scipy.sparse import coo_matrix, diags

    flat = np.concatenate([np.append(np.asarray(r, np.int64), np.full(WINDOW, -1)) for r in rows] or [np.empty(0, int)])
    lefts, rights = [], []
    for offset in range(1, WINDOW + 1):
        a, b = flat[:-offset], flat[offset:]
        real = (a >= 0) & (b >= 0)
        lefts += [a[real], b[real]]
        rights += [b[real], a[real]]
    left, right = np.concatenate(lefts), np.concatenate(rights)
    counts_VV = coo_matrix((np.ones(len(left)), (left, right)), shape=(vocabulary, vocabulary)).tocsr()
    near_V = np.asarray(counts_VV.sum(1)).ravel()
    inverse = diags(1 / np.maximum(near_V, 1))
    ppmi_VV = (inverse @ counts_VV @ inverse) * max(near_V.sum(), 1)
    ppmi_VV.data = np.maximum(np.log(np.maximum(ppmi_VV.data, 1e-12)), 0)
    rank = min(width, vocabulary - 1, max(int((near_V > 0).sum()) - 1, 1))
    vectors_VD = np.zeros((vocabulary, width), np.float32)
    if ppmi_VV.nnz:
        # Randomized (Halko et al. 2011): the library's Lanczos iteration gives other signs from call to call.
        q_VR = ppmi_VV @ np.random.default_rng(seed).standard_normal((vocabulary, min(rank + 16, vocabulary)))
        for _ in range(4):
            q_VR = np.linalg.qr(ppmi_VV @ np.linalg.qr(ppmi_VV.T @ np.linalg.qr(q_VR)[0])[0])[0]
        u_RR, s_R, _ = np.linalg.svd((ppmi_VV.T @ q_VR).T, full_matrices=False)
        vectors_VD[:, :rank] = (q_VR @ u_RR)[:, :rank] * np.sqrt(s_R[:rank])
    return vectors_VD
