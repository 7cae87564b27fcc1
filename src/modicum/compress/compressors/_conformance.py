"""What must hold for any compressor, on a toy decoder stored in bfloat16.

`check_*` functions take a method's key and are run for every method of the port.
"""

from __future__ import annotations

import dataclasses
import io
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from modicum.compress import calibration
from modicum.compress.compressors import Compressor
from modicum.compress.method import compress_model, compress_with, setting_up
from modicum.compress.run import CompressResult
from modicum.core import compose, registry
from modicum.core.choice import Choice
from modicum.core.errors import UserError
from modicum.core.events import Events, Progress
from modicum.core.files import sha256
from modicum.data.document import Document, write_documents
from modicum.data.tokenizer import Tokenizer
from modicum.model import attach
from modicum.model.config import llama_like
from modicum.model.decoder import Decoder
from modicum.model.folder import load_model, save_model

TEXT = "some text to be read, word by word, and to be forgotten again afterwards "


class _Quiet(Events):
    """No progress line; `stop`: the block after which the run is killed."""

    def __init__(self, stop: int | None = None):
        super().__init__(None)
        self.stop = stop
        self.seen: list[int] = []

    def progress(self, label: str, total: float | None, unit: str = "") -> Any:
        return Progress(label, total, unit, io.StringIO())

    def emit(self, kind: str, **fields: Any) -> None:
        if kind == "block":
            self.seen.append(fields["index"])
            if fields["index"] == self.stop:
                raise _Killed


class _Killed(Exception):
    pass


@contextmanager
def _stored(key: str, layers: int = 3) -> Iterator[Path]:
    """A folder with `model` and `text`, and room for what is made. A method that needs another kind of model says so:
    TOY_SHAPE, fields of its config."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        tokenizer = Tokenizer.train([TEXT], 300)
        tokenizer.save(root / "tokenizer")
        config = llama_like(tokenizer.vocab_size, 48, layers, 4, kv_heads=2, mlp_width=80, context_length=64)
        config = dataclasses.replace(config, **getattr(_module(key), "TOY_SHAPE", {}))
        model = Decoder(config, torch.Generator().manual_seed(0)).to(torch.bfloat16)
        save_model(model, root / "model", root / "tokenizer")
        documents = (Document(str(i), TEXT * (3 + i % 5)) for i in range(12))
        write_documents(root / "text" / "documents" / "train-00000.parquet", documents)
        yield root


def _module(key: str) -> Any:
    return registry.load("compressor", key, Compressor).module


def _choice(key: str) -> Choice:
    loaded = registry.load("compressor", key, Compressor)
    return Choice("compressor", key, dataclasses.asdict(getattr(loaded.module, "TOY", loaded.config())))


def _method(key: str) -> type[Compressor]:
    return registry.load("compressor", key, Compressor).cls


def _compress(root: Path, key: str, out: str, events: Events | None = None, **given: Any) -> CompressResult:
    folder, events = root / out, events or _Quiet()
    return compress_with(
        root / "model", _choice(key), folder, calibration=root / "text", sequences=12, length=32, events=events, **given
    )


def _logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return load_model(folder, dtype=torch.float32)(torch.arange(3, 35).view(2, 16))


def _files(folder: Path) -> dict[str, str]:
    return {p.name: sha256(p) for p in folder.iterdir() if p.name != "compress.json"}


def check_a_killed_run_goes_on_to_the_same_files(key: str) -> None:
    """Killed after a block and started again, it computes only the rest and writes the same bytes."""
    with _stored(key) as root:
        _compress(root, key, "whole")
        first, second = _Quiet(stop=0), _Quiet()
        try:
            _compress(root, key, "resumed", first)
        except _Killed:
            pass
        else:
            raise AssertionError("the run did not tell of its first block")
        assert not (root / "resumed").exists(), "a killed run left a model"
        _compress(root, key, "resumed", second)
        assert second.seen == [1, 2], f"blocks {second.seen} were computed after block 0 was finished"
        assert _files(root / "whole") == _files(root / "resumed"), "the resumed run wrote other bytes"
        left = [p.name for p in root.iterdir() if p.name.startswith(".")]
        assert not left, f"{left} stayed behind"


def check_what_it_leaves_is_what_it_says(key: str) -> None:
    """Forms, plain weights of the same shapes, or another architecture; what is stored loads and says its bytes."""
    with _stored(key) as root:
        result = _compress(root, key, "out")
        before, after = load_model(root / "model"), load_model(root / "out")
        forms, leaves = attach.forms(after), _method(key).leaves
        assert leaves in ("forms", "weights", "shape"), leaves
        if leaves == "forms":
            names = {n for n in attach.linears(before) if n.startswith("layers.")}
            assert set(forms) == names, names ^ set(forms)
            assert 8 * sum(f.nbytes() for f in forms.values()) == round(result.bits_per_weight * result.weights)
            assert result.bytes < result.original_bytes
        else:
            assert not forms, f"{list(forms)[:3]} are forms"
        if leaves == "weights":
            shapes = [{n: p.shape for n, p in m.named_parameters()} for m in (before, after)]
            assert shapes[0] == shapes[1] and result.zeros > 0
        if leaves == "shape":
            smaller_heads = after.config.head_dim < before.config.head_dim  # what a device has of the cache
            assert after.config != before.config and (result.bytes < result.original_bytes or smaller_heads)
        assert bool(_logits(root / "out").isfinite().all())
        assert torch.equal(before.embed.weight, after.embed.weight), "the token embedding was changed"


def check_it_changes_only_its_targets(key: str) -> None:
    """With targets in one layer, matrices elsewhere keep their bits."""
    if _method(key).leaves == "shape":
        return
    with _stored(key) as root:
        _compress(root, key, "out", targets=["layers.1.mlp.*"])
        before, after = load_model(root / "model"), load_model(root / "out")
        changed = 0
        for name, layer in attach.linears(before).items():
            now = after.get_submodule(name)
            same = isinstance(now, torch.nn.Linear) and torch.equal(layer.weight, now.weight)  # type: ignore[arg-type]
            assert same or name.startswith("layers.1.mlp."), f"{name} changed"
            changed += not same
        assert changed == 3, f"{changed} of 3 targets changed"


def check_text_is_read_where_it_is_required(key: str) -> None:
    """Without calibration text it is refused before anything is written, or it works and other text changes nothing."""
    loaded, choice = _method(key), _choice(key)
    config = dataclasses.replace(llama_like(300, 48, 1, 4), **getattr(_module(key), "TOY_SHAPE", {}))
    reads = "calibration_text" in loaded.capabilities(choice.config()).requires
    if reads:
        try:
            compose.resolve(setting_up(choice, config, text=False))
        except UserError as error:
            assert "\n" not in str(error)
        else:
            raise AssertionError("accepted without the text that it requires")
    with _stored(key, layers=2) as root:
        _compress(root, key, "one")
        tokens = root / "other"
        write_documents(
            tokens / "documents" / "train-00000.parquet", (Document(str(i), TEXT[::-1] * 5) for i in range(12))
        )
        given: dict[str, Any] = {"calibration": tokens, "sequences": 12, "length": 32} if reads else {}
        compress_with(root / "model", choice, root / "two", events=_Quiet(), **given)
        if not reads:
            assert _files(root / "one") == _files(root / "two"), "text that it does not require changes what it writes"


def check_blocks_in_memory_are_compressed_alike(key: str) -> None:
    """Benches compress a model in memory: the same logits as the folder's."""
    with _stored(key, layers=2) as root:
        _compress(root, key, "out")
        tokens = calibration.sequences(calibration.texts(root / "text"), Tokenizer.load(root / "model"), 12, 32)
        made = compress_model(load_model(root / "model"), _choice(key), tokens, root / "work", _Quiet()).float()
        with torch.no_grad():
            logits = made(torch.arange(3, 35).view(2, 16))
        torch.testing.assert_close(logits, _logits(root / "out"), atol=1e-5, rtol=1e-5)
