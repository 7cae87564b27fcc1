"""tpla: latent attention against its equations in float64, split in one process and over two."""

from __future__ import annotations

import math
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from modicum.bench.fixtures import Quiet
from modicum.compress.compressors import tpla
from modicum.compress.method import compress_model
from modicum.core.choice import Choice
from modicum.core.errors import UserError
from modicum.model.attend import DenseAttend
from modicum.model.config import DecoderConfig
from modicum.model.decoder import Decoder
from modicum.model.folder import load_model, save_model
from modicum.model.mixers import mla
from modicum.model.rope import rotate
from modicum.serve.config import EngineConfig
from modicum.serve.engine import Engine
from modicum.serve.request import SamplingParams

V, D, H, R, P = 61, 32, 4, 16, 4
TOKENS = torch.randint(1, V, (3, 20), generator=torch.Generator().manual_seed(1))


def decoder(layers: int = 2) -> Decoder:
    shape = mla.shape(H, R, P)
    config = DecoderConfig(
        family="modicum", vocab_size=V, width=D, layers=layers, mlp_width=48, context_length=64, tied=True, **shape
    )
    model = Decoder(config, torch.Generator().manual_seed(0)).double()
    assert config.parameters() == sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        for layer in model.layers:
            a: Any = layer.attention
            a.norm.copy_(1 + 0.3 * torch.randn(R, generator=torch.Generator().manual_seed(2)))
            a.kv.weight[P:] *= torch.linspace(0.2, 6, R)[:, None]  # latents with directions that matter more
            for m in (a.q, a.k_up):
                m.weight.mul_(4)
    return model


def split(model: Decoder, choice: str, tmp: Path) -> Decoder:
    made = compress_model(model, Choice.parse("compressor", choice), TOKENS, tmp, Quiet())
    return made.double()


def by_hand(
    a: Any, x_BTD: torch.Tensor, rotation: Any, turn: torch.Tensor, ranks: int, ratio: Any, boost: float
) -> torch.Tensor:
    """Attention of the original weights `a`, its latent turned and split, score by score."""
    T, K, C = x_BTD.shape[1], D // H, R // ranks
    raw = a.kv(x_BTD)
    key = rotate(raw[..., :P][:, None], *rotation)[:, 0]
    latent = raw[..., P:] @ turn
    q = a.q(x_BTD).unflatten(-1, (H, P + K))
    out = torch.zeros(len(x_BTD), T, H, K, dtype=torch.float64)
    for i in range(ranks):
        part = latent[..., i * C : (i + 1) * C]
        part = part / (part.square().mean(-1, keepdim=True) * ratio[i] + a.eps).sqrt()
        for h in range(H):
            up_k, up_v = (m.weight[h * K : (h + 1) * K] * a.norm @ turn for m in (a.k_up, a.v_up))
            up_k, up_v = up_k[:, i * C : (i + 1) * C], up_v[:, i * C : (i + 1) * C]
            turned = rotate(q[:, None, :, h, :P], *rotation)[:, 0]
            score = turned @ key.transpose(1, 2) + boost * q[:, :, h, P:] @ (part @ up_k.T).transpose(1, 2)
            score = (score / math.sqrt(P + K)).masked_fill(torch.ones(T, T).triu(1).bool(), -1e300)
            out[:, :, h] += score.softmax(-1) @ (part @ up_v.T)
    return a.o(out.flatten(2))


def attention_of(model: Decoder, x_BTD: torch.Tensor) -> tuple[torch.Tensor, Any]:
    positions = torch.arange(x_BTD.shape[1])[None]
    rotation = model.rotations(positions, torch.float64)[0]
    return model.layers[0].attention(x_BTD, rotation, DenseAttend()), rotation


@torch.no_grad()
def test_latent_attention_is_the_papers_and_turning_it_changes_nothing(tmp_path: Path) -> None:
    model = decoder()
    x_BTD = torch.randn(2, 12, D, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    got, rotation = attention_of(model, x_BTD)
    want = by_hand(model.layers[0].attention, x_BTD, rotation, torch.eye(R, dtype=torch.float64), 1, [1.0], 1.0)
    torch.testing.assert_close(got, want)
    logits = model(TOKENS)
    for rotate_by in ("pca", "hadamard"):
        same = split(decoder(), f"tpla:ranks=1,rotate={rotate_by}", tmp_path / rotate_by)
        torch.testing.assert_close(same(TOKENS), logits, atol=1e-6, rtol=1e-4)  # blocks are float32


@torch.no_grad()
@pytest.mark.parametrize("rotate_by", ["none", "hadamard", "pca"])
def test_every_device_has_a_softmax_of_its_own(tmp_path: Path, rotate_by: str) -> None:
    model, method = decoder(1), tpla.Tpla(tpla.Config(rotate=rotate_by))  # type: ignore[arg-type]
    a: Any = model.layers[0].attention
    normed = model.layers[0].attention_norm(model.embed(TOKENS))
    latent = a.latent(normed)[1][:, 0].flatten(0, 1) / a.norm
    turn = method.directions(latent.T @ latent)
    means = (latent @ turn).square().mean(0).view(2, -1).mean(1)
    ratio, boost = ((1 / means).tolist(), 1.0) if rotate_by == "pca" else ([1.0, 1.0], 2.0)
    if rotate_by == "pca":
        assert means[0] > 1.2 and means[1] < 0.8
    made = split(decoder(1), f"tpla:rotate={rotate_by}", tmp_path)
    assert made.config.kv_heads == 2 and made.config.heads == 2 * H and made.config.head_dim == P + R // 2
    x_BTD = torch.randn(2, 12, D, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    got, rotation = attention_of(made, x_BTD)
    torch.testing.assert_close(got, by_hand(a, x_BTD, rotation, turn, 2, ratio, boost), atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_it_is_saved_and_served_like_any_model(tmp_path: Path) -> None:
    made = split(decoder(), "tpla", tmp_path / "work").float()
    assert made.config.parameters() == sum(p.numel() for p in made.parameters())
    save_model(made, tmp_path / "out")
    read = load_model(tmp_path / "out")
    torch.testing.assert_close(read(TOKENS), made(TOKENS))
    engine = Engine(read, None, EngineConfig(cache="512tok"))
    prompt = TOKENS[0].tolist()
    answer = engine.generate([prompt], SamplingParams(temperature=0, max_tokens=6, ignore_eos=True))[0].tokens
    for token in answer:
        assert token == int(read(torch.tensor([prompt]))[0, -1].argmax())
        prompt = [*prompt, token]


def test_it_trains_in_bfloat16() -> None:
    """Where the kernels of a training step know softmax attention alone, and leave the rest to its modules."""
    model = decoder().bfloat16()
    loss = model(TOKENS).float().log_softmax(-1)[:, :-1].gather(-1, TOKENS[:, 1:, None]).mean()
    loss.backward()
    for name, p in model.named_parameters():
        assert not p.requires_grad or (p.grad is not None and bool(p.grad.isfinite().all())), name


def _device(rank: int, port: int, folder: str, out: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    part = mla.shard(load_model(folder), rank, torch.distributed.group.WORLD)
    with torch.no_grad():
        logits = part(TOKENS)
    if rank == 0:
        torch.save(logits, out)
    torch.distributed.destroy_process_group()


@torch.no_grad()
def test_two_processes_compute_what_one_does(tmp_path: Path) -> None:
    made = split(decoder(), "tpla", tmp_path / "work")
    save_model(made, tmp_path / "model")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(_device, (port, str(tmp_path / "model"), str(tmp_path / "logits")), nprocs=2)
    torch.testing.assert_close(torch.load(tmp_path / "logits", weights_only=True), made(TOKENS))
    part = mla.shard(made, 1)
    assert part.config.kv_bytes_per_token() * 2 == made.config.kv_bytes_per_token()


def test_what_does_not_fit_is_refused() -> None:
    from modicum.model.config import llama_like

    with pytest.raises(UserError, match="mixer mla"):
        tpla.Tpla(tpla.Config()).check(llama_like(V, 32, 2))
    with pytest.raises(UserError, match="ranks=3"):
        tpla.Tpla(tpla.Config(ranks=3)).check(decoder().config)
