"""Token shards: documents as token ids in memory-mapped files, by domain.

    FOLDER/manifest.json     counts, checksums, tokenizer; written last: a folder without it is unfinished
    FOLDER/DOMAIN/00000.bin  token ids, little-endian uint16 (or uint32), documents one after another
    FOLDER/DOMAIN/00000.idx  int64 [documents + 1, 2]: where each document starts, in tokens and in bytes
    FOLDER/DOMAIN/00000.site int32 [documents]: which of the part's sites each document comes from
    FOLDER/DOMAIN/00000.sites.json   name and token ids of each site, as a document's metadata (`METADATA`)
    FOLDER/DOMAIN/00000.quality      float32 [documents]: scores, NaN where unknown; absent where nobody gave one

What stands beside the tokens (.site, .quality) is optional: folders written before it can be read.

A stored document is `start t1 ... tn eos`, where start is the tokenizer's bos or else its eos: every
token of the text, the first included, is then predicted from something, and so is the end. A document
of N stored tokens gives N - 1 predictions.
"""

from __future__ import annotations

import array
import contextlib
import functools
import math
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from modicum.core.errors import CorruptError, UserError
from modicum.core.files import atomic_file, fingerprint, read_json, sha256, write_json
from modicum.data.document import Document
from modicum.data.tokenizer import Tokenizer

BATCH_BYTES = 1 << 20  # text encoded at once
METADATA = "URL: {}\n\n"  # Gao et al. 2025, arXiv:2501.01956, section 2
BESIDE: dict[str, np.dtype[Any]] = {"quality": np.dtype("<f4"), "site": np.dtype("<i4")}


class Documents(Protocol):
    """What a stream reads: token shards, or documents in memory."""

    @property
    def domains(self) -> list[str]: ...
    def documents(self, domain: str) -> int:
        """Number of documents."""

    def lengths(self, domain: str) -> np.ndarray:
        """int64 [documents]: stored tokens of each."""

    def tokens(self, domain: str, i: int) -> np.ndarray:
        """Stored token ids of document i, a view."""

    def loss_start(self, domain: str, i: int) -> int:
        """How many leading tokens of document i are given rather than learnt (1 = only the start token)."""

    def metadata(self, domain: str, i: int) -> np.ndarray:
        """Token ids of what is known of document i besides its text. Raises UserError if nothing was kept."""

    def quality(self, domain: str) -> np.ndarray:
        """float32 [documents]: scores, NaN where unknown. Raises UserError if none were kept."""

    @property
    def reserved(self) -> int:
        """Ids at the vocabulary's end that no text uses."""

    @property
    def fingerprint(self) -> str: ...


def folder_of(domain: str) -> str:
    """A safe folder name for a domain; different domains have different names."""
    name = urllib.parse.quote(domain, safe="")
    return name.replace(".", "%2E", 1) if name.startswith(".") else name


def write_part(folder: str | Path, part: int, documents: Iterable[Document], tokenizer: Tokenizer) -> dict[str, Any]:
    """Encode one part of a corpus: one .bin and .idx per domain. Gives the manifest's entries by domain.

    Memory is that of the part's index, 16 bytes a document.
    """
    kind = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    files: dict[str, BinaryIO] = {}
    index: dict[str, array.array[int]] = {}
    sites: dict[str, dict[str, int]] = {}
    beside: dict[str, dict[str, array.array[Any]]] = {}
    entries = {}
    with contextlib.ExitStack() as stack:
        for batch in _batches(documents):
            encoded = tokenizer.encode_batch([d.text for d in batch], specials=False)
            for document, ids in zip(batch, encoded, strict=True):
                domain = document.domain
                if domain not in files:
                    bin_path = Path(folder) / folder_of(domain) / f"{part:05d}.bin"
                    files[domain] = stack.enter_context(atomic_file(bin_path))
                    index[domain] = array.array("q", (0, 0))
                    sites[domain], beside[domain] = {}, {"quality": array.array("f"), "site": array.array("i")}
                tokens = np.empty(len(ids) + 2, kind)
                tokens[0], tokens[1:-1], tokens[-1] = tokenizer.start_id, ids, tokenizer.eos_id
                files[domain].write(tokens.data)
                rows = index[domain]
                rows.extend((rows[-2] + len(tokens), rows[-1] + document.nbytes))
                score = document.quality
                beside[domain]["quality"].append(math.nan if score is None else score)
                beside[domain]["site"].append(sites[domain].setdefault(document.site, len(sites[domain])))
    for domain in sorted(files):
        stem = Path(folder) / folder_of(domain) / f"{part:05d}"
        rows = index[domain]
        with atomic_file(f"{stem}.idx") as file:
            file.write(np.asarray(rows, "<i8").data)
        entries[domain] = {
            "file": f"{folder_of(domain)}/{part:05d}",
            "documents": len(rows) // 2 - 1,
            "tokens": rows[-2],
            "bytes": rows[-1],
            "sha256": sha256(f"{stem}.bin"),
            "index_sha256": sha256(f"{stem}.idx"),
        }
        metadata = tokenizer.encode_batch([METADATA.format(name) for name in sites[domain]], specials=False)
        write_json(f"{stem}.sites.json", dict(zip(sites[domain], metadata, strict=True)))
        entries[domain]["sites_sha256"] = sha256(f"{stem}.sites.json")
        for name, dtype in BESIDE.items():
            values = np.asarray(beside[domain][name], dtype)
            if name == "site" or not np.isnan(values).all():
                with atomic_file(f"{stem}.{name}") as file:
                    file.write(values.data)
                entries[domain][f"{name}_sha256"] = sha256(f"{stem}.{name}")
    return entries


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def write_manifest(folder: str | Path, parts: Iterable[Mapping[str, Any]], tokenizer: Tokenizer) -> dict[str, Any]:
    """Join the parts' entries (in order) into manifest.json, which makes the folder whole."""
    domains: dict[str, dict[str, Any]] = {}
    for part in parts:
        for name, entry in part.items():
            total = domains.setdefault(name, {"documents": 0, "tokens": 0, "bytes": 0, "shards": []})
            for count in ("documents", "tokens", "bytes"):
                total[count] += entry[count]
            total["shards"].append(dict(entry))
    manifest = {
        "version": 1,
        "dtype": "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32",
        "tokenizer": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "start_id": tokenizer.start_id,
        "eos_id": tokenizer.eos_id,
        "reserved": tokenizer.reserved,
        "domains": dict(sorted(domains.items())),
    }
    write_json(Path(folder) / "manifest.json", manifest)
    return manifest


def write_shards(folder: str | Path, documents: Iterable[Document], tokenizer: Tokenizer) -> TokenShards:
    """All of `documents` as one part: for corpora that fit in memory."""
    write_manifest(folder, [write_part(folder, 0, documents, tokenizer)], tokenizer)
    return TokenShards(folder)


class TokenShards:
    """Reads a folder of shards. Opening checks lengths (cheap); `verify` checks every checksum."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        path = self.folder / "manifest.json"
        if not path.is_file():
            raise UserError(
                f"{folder} has no manifest.json: not token shards, or unfinished; "
                "type: modicum curate SOURCE --out FOLDER, then give FOLDER/tokens/train"
            )
        try:
            self.manifest = read_json(path)
            self.dtype = np.dtype(self.manifest["dtype"]).newbyteorder("<")
            self._shards = {
                d: [_Shard(self.folder / s["file"], s, self.dtype) for s in entry["shards"]]
                for d, entry in self.manifest["domains"].items()
            }
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptError(f"{path} is damaged ({type(error).__name__}: {error}); curate again") from None
        self._first = {d: np.cumsum([0] + [s.documents for s in parts]) for d, parts in self._shards.items()}

    @property
    def domains(self) -> list[str]:
        return sorted(self._shards)

    @property
    def fingerprint(self) -> str:
        """Names the content: two folders with equal tokens in equal order have equal fingerprints."""
        content = {d: [s["sha256"] for s in e["shards"]] for d, e in self.manifest["domains"].items()}
        return fingerprint([self.manifest["tokenizer"], content])

    @property
    def vocab_size(self) -> int:
        return int(self.manifest["vocab_size"])

    def documents(self, domain: str) -> int:
        return int(self._first[domain][-1])

    def total(self, what: str = "tokens", domain: str | None = None) -> int:
        """Stored "tokens", text "bytes" or "documents", of one domain or all."""
        names = self.domains if domain is None else [domain]
        return sum(int(self.manifest["domains"][d][what]) for d in names)

    def lengths(self, domain: str) -> np.ndarray:
        parts = [np.diff(s.index[:, 0]) for s in self._shards[domain]]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def tokens(self, domain: str, i: int) -> np.ndarray:
        shard, row = self._find(domain, i)
        return shard.tokens[shard.index[row, 0] : shard.index[row + 1, 0]]

    def text_bytes(self, domain: str, i: int) -> int:
        """UTF-8 bytes of document i's text."""
        shard, row = self._find(domain, i)
        return int(shard.index[row + 1, 1] - shard.index[row, 1])

    def loss_start(self, domain: str, i: int) -> int:
        return 1

    @property
    def reserved(self) -> int:
        return int(self.manifest.get("reserved", 0))

    def metadata(self, domain: str, i: int) -> np.ndarray:
        shard, row = self._find(domain, i)
        number = int(shard.beside("site")[row])
        return shard.sites[number]

    def quality(self, domain: str) -> np.ndarray:
        if not any("quality_sha256" in shard.entry for shard in self._shards[domain]):
            raise no_scores(domain)
        return np.concatenate(
            [
                shard.beside("quality")
                if "quality_sha256" in shard.entry
                else np.full(shard.documents, np.nan, np.float32)
                for shard in self._shards[domain]
            ]
        )

    def _find(self, domain: str, i: int) -> tuple[_Shard, int]:
        first = self._first[domain]
        if not 0 <= i < first[-1]:
            raise IndexError(f"document {i} of domain {domain!r}, which has {first[-1]}")
        k = int(np.searchsorted(first, i, side="right")) - 1
        return self._shards[domain][k], i - int(first[k])

    def verify(self) -> None:
        """Recompute every checksum. Raises CorruptError naming the first file that differs."""
        for shards in self._shards.values():
            for shard in shards:
                for suffix, key in (
                    (".bin", "sha256"),
                    (".idx", "index_sha256"),
                    (".site", "site_sha256"),
                    (".sites.json", "sites_sha256"),
                    (".quality", "quality_sha256"),
                ):
                    path = shard.stem.with_name(shard.stem.name + suffix)
                    if key in shard.entry and sha256(path) != shard.entry[key]:
                        raise CorruptError(f"{path} does not match its checksum; curate again")


class _Shard:
    def __init__(self, stem: Path, entry: Mapping[str, Any], dtype: np.dtype):
        self.stem, self.entry, self.documents = stem, entry, int(entry["documents"])
        self.index = _mapped(stem.with_name(stem.name + ".idx"), np.dtype("<i8"), 2 * (self.documents + 1))
        self.index = self.index.reshape(-1, 2)
        self.tokens = _mapped(stem.with_name(stem.name + ".bin"), dtype, int(entry["tokens"]))
        if self.index[0, 0] != 0 or self.index[-1, 0] != entry["tokens"]:
            raise CorruptError(f"{stem}.idx does not agree with the manifest; curate again")
        self.kept: dict[str, np.ndarray] = {}

    def beside(self, name: str) -> np.ndarray:
        """One figure a document: "quality" or "site"."""
        if name not in self.kept:
            if f"{name}_sha256" not in self.entry:
                raise UserError(
                    f"{self.stem.parent} keeps no {name} of its documents: it was curated before "
                    "that was done; curate again into another folder"
                )
            path = self.stem.with_name(f"{self.stem.name}.{name}")
            self.kept[name] = _mapped(path, BESIDE[name], self.documents)
        return self.kept[name]

    @functools.cached_property
    def sites(self) -> list[np.ndarray]:
        """Metadata tokens of each of the part's sites."""
        path = self.stem.with_name(f"{self.stem.name}.sites.json")
        try:
            return [np.asarray(ids, np.int64) for ids in read_json(path).values()]
        except (OSError, ValueError, AttributeError) as error:
            raise CorruptError(f"{path} is damaged ({type(error).__name__}); curate again") from None


def no_scores(domain: str) -> UserError:
    return UserError(
        f"the documents of {domain!r} have no quality scores, so there is no order by them; give records "
        'with a number in "quality" (JSONL, Parquet), or curate with the step `score`'
    )


def _mapped(path: Path, dtype: np.dtype, count: int) -> np.ndarray:
    size = path.stat().st_size if path.is_file() else -1
    if size != count * dtype.itemsize:
        state = "missing" if size < 0 else f"{size} bytes"
        raise CorruptError(f"{path} should have {count * dtype.itemsize} bytes and is {state}; curate again")
    return np.memmap(path, dtype, "r", shape=(count,)) if count else np.zeros(0, dtype)


class MemoryDocuments:
    """Documents in memory behind the same protocol: tests, and question/answer pairs.

    examples: {domain: [(tokens, loss_start), ...]}, where the first `loss_start` tokens of an example
    (its start token and its question, say) are given and carry no loss. metadata: {domain: token ids of each
    document's}; quality: {domain: score of each}; reserved: ids at the vocabulary's end that no text uses.
    """

    def __init__(
        self,
        examples: Mapping[str, Iterable[tuple[Iterable[int], int]]],
        *,
        metadata: Mapping[str, Iterable[Iterable[int]]] | None = None,
        quality: Mapping[str, Iterable[float]] | None = None,
        reserved: int = 0,
    ):
        self.reserved = reserved
        self._metadata = {d: [np.fromiter(ids, np.int64) for ids in rows] for d, rows in (metadata or {}).items()}
        self._quality = {d: np.fromiter(scores, np.float32) for d, scores in (quality or {}).items()}
        self._tokens: dict[str, list[np.ndarray]] = {}
        self._starts: dict[str, list[int]] = {}
        for domain, rows in examples.items():
            pairs = [(np.fromiter(tokens, np.int64), int(start)) for tokens, start in rows]
            self._tokens[domain] = [tokens for tokens, _ in pairs]
            self._starts[domain] = [start for _, start in pairs]

    @property
    def domains(self) -> list[str]:
        return sorted(self._tokens)

    @property
    def fingerprint(self) -> str:
        return fingerprint(
            {
                d: [(t.tolist(), s) for t, s in zip(rows, self._starts[d], strict=True)]
                for d, rows in self._tokens.items()
            }
        )

    def documents(self, domain: str) -> int:
        return len(self._tokens[domain])

    def lengths(self, domain: str) -> np.ndarray:
        return np.array([len(t) for t in self._tokens[domain]], np.int64)

    def tokens(self, domain: str, i: int) -> np.ndarray:
        return self._tokens[domain][i]

    def loss_start(self, domain: str, i: int) -> int:
        return self._starts[domain][i]

    def metadata(self, domain: str, i: int) -> np.ndarray:
        if domain not in self._metadata:
            raise UserError(f"the documents of {domain!r} have no metadata; give MemoryDocuments(metadata=...)")
        return self._metadata[domain][i]

    def quality(self, domain: str) -> np.ndarray:
        if domain not in self._quality or np.isnan(self._quality[domain]).all():
            raise no_scores(domain)
        return self._quality[domain]
