"""Bits under a budget against enumeration; estimates against divergences; a model compressed to a size."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from modicum.compress import sensitivity, sizing
from modicum.compress.allocate import Unit, allocate, least_bytes, total
from modicum.compress.compressors._affine import AffineConfig, rounded
from modicum.compress.divergence import original, scores
from modicum.compress.run import weight_bytes
from modicum.core.errors import UserError
from modicum.core.events import Events
from modicum.data.document import Document, write_documents
from modicum.data.tokenizer import Tokenizer
from modicum.model import attach
from modicum.model.config import llama_like
from modicum.model.decoder import Decoder
from modicum.model.folder import load_model, save_model

TEXT = "some text to be read, word by word, and to be forgotten again afterwards "


@pytest.mark.parametrize("seed", range(5))
def test_an_allocation_is_the_best_of_all(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    units = []
    for u in range(4):
        nbytes = tuple(sorted(torch.randint(50, 1000, (5,), generator=generator).tolist()))
        errors = tuple(sorted(torch.rand(5, generator=generator).tolist(), reverse=True))
        units.append(Unit((str(u),), (2, 3, 4, 8, None), nbytes, errors))
    for budget in (least_bytes(units), 1500, 2200, 3000):
        if budget < least_bytes(units):
            continue
        every = (total(units, c) for c in itertools.product(range(5), repeat=4))
        best = min(error for nbytes, error in every if nbytes <= budget)
        nbytes, error = total(units, allocate(units, budget))
        assert nbytes <= budget and error == pytest.approx(best, rel=1e-3)
    with pytest.raises(UserError, match="at the fewest bits"):
        allocate(units, least_bytes(units) - 1)


def test_an_estimate_is_half_the_weighted_error() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 24, dtype=torch.float64, generator=generator)
    x = torch.randn(50, 24, dtype=torch.float64, generator=generator)
    g = torch.rand(6, dtype=torch.float64, generator=generator)
    setting = AffineConfig(bits=4, group=8, scale_dtype="float32")
    left = rounded(weight, setting).weight(torch.float64) - weight
    want = 0.5 * sum(float(g[o] * (x @ left[o]).square().mean()) for o in range(6))
    assert sensitivity.estimate(weight, x.T @ x / 50, g, setting) == pytest.approx(want, rel=1e-5)


def test_estimates_rank_matrices_as_their_divergences_do() -> None:
    """Each matrix rounded by itself: the estimate is near the measured KL, and the order of matrices is kept."""
    torch.manual_seed(0)
    model = Decoder(
        llama_like(80, 64, 3, 4, kv_heads=2, mlp_width=96, context_length=64), torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0 if parameter.dim() == 2 else 1.0)
    tokens = torch.randint(3, 80, (64, 32), generator=torch.Generator().manual_seed(1))
    names = [n for n in attach.linears(model) if n.startswith("layers.")]
    inputs: dict[str, torch.Tensor] = {}
    layers: Any = attach.linears(model)
    hooks = [
        layers[n].register_forward_pre_hook(lambda m, a, n=n: inputs.__setitem__(n, a[0].flatten(0, 1))) for n in names
    ]
    with torch.no_grad():
        model(tokens)
    for hook in hooks:
        hook.remove()
    gradients = sensitivity.output_gradients(model, names, tokens)
    before, setting = original(model, tokens)[0], AffineConfig(bits=4, group=32)
    pairs = []
    for name in names:
        weight = layers[name].weight
        kept = weight.detach().clone()
        x = inputs[name]
        guess = sensitivity.estimate(kept, x.T @ x / len(x), gradients[name], setting)
        weight.data = rounded(kept, setting).weight()
        pairs.append((guess, sum(s.kl for s in scores(model, tokens, before)) / len(tokens)))
        weight.data = kept
    guesses, measured = (torch.tensor(column) for column in zip(*pairs, strict=True))
    ranks = torch.stack([guesses.argsort().argsort().float(), measured.argsort().argsort().float()])
    assert float(torch.corrcoef(ranks)[0, 1]) > 0.8
    assert 0.4 < float(guesses.sum() / measured.sum()) < 2.5
    assert all(p.requires_grad for p in model.parameters())


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sizing")
    tokenizer = Tokenizer.train([TEXT], 300)
    tokenizer.save(root / "tokenizer")
    config = llama_like(tokenizer.vocab_size, 128, 2, 4, kv_heads=2, mlp_width=256, context_length=64)
    model = Decoder(config, torch.Generator().manual_seed(0)).to(torch.bfloat16)
    with torch.no_grad():
        model.layers[0].mlp.down.weight.mul_(40)  # matters far more than the rest  # type: ignore[union-attr,operator]
    save_model(model, root / "model", root / "tokenizer")
    for side in ("train", "heldout"):
        documents = (Document(f"{side}{i}", TEXT * (3 + i % 5)) for i in range(60))
        write_documents(root / "text" / "documents" / f"{side}-00000.parquet", documents)
    return root


SHORT: dict[str, Any] = {"sequences": 8, "length": 32, "methods": ("rtn", "gptq")}


def test_a_model_fits_its_size_and_bits_go_where_they_matter(stored: Path, tmp_path: Path) -> None:
    size = 260_000
    made = sizing.compress_to(stored / "model", size, tmp_path / "out", calibration=stored / "text", **SHORT)
    assert made.bytes == weight_bytes(tmp_path / "out") <= size and made.bytes > 0.75 * size
    forms = attach.forms(load_model(tmp_path / "out"))
    bits = {n: f.nbytes() / (f.in_features * f.out_features) for n, f in forms.items() if n.startswith("layers.")}
    assert "layers.0.mlp.down" not in bits or bits["layers.0.mlp.down"] == max(bits.values())
    assert len(set(bits.values())) > 1 and made.domains[0].name == "text" and len(made.domains) == 2
    assert (
        not list(tmp_path.glob(".*"))
        and json.loads((tmp_path / "out" / "compress.json").read_text())["bytes"] == made.bytes
    )
    assert made.domains[0].kl <= made.domains[0].uniform_kl + 2 * made.domains[0].gain_stderr


def test_sizes_that_cannot_be_are_refused_with_the_least_that_can(stored: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"give --to (\S+)MiB or more") as caught:
        sizing.compress_to(stored / "model", 100_000, tmp_path / "out", calibration=stored / "text", **SHORT)
    least = float(str(caught.value).split("--to ")[1].split("MiB")[0]) * 2**20
    with pytest.raises(UserError, match="as it is"):
        sizing.compress_to(stored / "model", 10**7, tmp_path / "out", calibration=stored / "text", **SHORT)
    with pytest.raises(UserError, match="has none"):
        sizing.compress_to(stored / "model", least, tmp_path / "out", methods=("wanda",))
    assert list(tmp_path.iterdir()) == []
    made = sizing.compress_to(stored / "model", least, tmp_path / "out", calibration=stored / "text", **SHORT)
    assert made.bytes <= least and made.bits["2 bits, group 64"] >= 10


def test_a_killed_run_goes_on_to_the_same_files(stored: Path, tmp_path: Path) -> None:
    class Stopping(Events):
        blocks = 0

        def emit(self, kind: str, **fields: Any) -> None:
            if kind == "block":
                self.blocks += 1
                if self.blocks == self.stop:
                    raise KeyboardInterrupt

    given: dict[str, Any] = {"calibration": stored / "text", **SHORT}
    sizing.compress_to(stored / "model", 260_000, tmp_path / "whole", events=(whole := _count(Stopping)), **given)
    blocks = whole.blocks
    for stop in (1, 2, 2):
        with pytest.raises(KeyboardInterrupt):
            sizing.compress_to(stored / "model", 260_000, tmp_path / "out", events=_count(Stopping, stop), **given)
        assert not (tmp_path / "out").exists()
    sizing.compress_to(stored / "model", 260_000, tmp_path / "out", events=(last := _count(Stopping)), **given)
    assert last.blocks < blocks - 3
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


def _count(kind: Any, stop: int = -1) -> Any:
    events = kind()
    events.stop = stop
    return events
