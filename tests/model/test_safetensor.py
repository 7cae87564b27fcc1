"""Tensors that are a file's pages: their values, what writing does, and what memory they take."""

from __future__ import annotations

import gc
import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from modicum.model import safetensor
from modicum.model.config import llama_like
from modicum.model.decoder import Decoder
from modicum.model.folder import load_model, save_model
from modicum.model.safetensor import SafetensorsFile, is_mapped, mapped_bytes, write_safetensors

LARGE = (512, 256)


def write(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    write_safetensors(path, [(n, tuple(t.shape), t.dtype, lambda t=t: t) for n, t in tensors.items()])
    return path


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = Decoder(llama_like(512, 128, 2, 4, 2, tied=True), torch.Generator().manual_seed(0)).to(torch.bfloat16)
    save_model(model, tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8])
def test_values_come_whole_mapped_or_not(tmp_path: Path, dtype: torch.dtype) -> None:
    wanted = {"large": torch.arange(512 * 256).view(LARGE).to(dtype), "small": torch.arange(7).to(dtype)}
    with SafetensorsFile(write(tmp_path / "x.safetensors", wanted)) as file:
        for name, tensor in wanted.items():
            got = file.read(name)
            assert got.dtype == dtype and torch.equal(got, tensor)
            assert is_mapped(got) == (name == "large")


def test_writing_to_a_mapped_tensor_is_this_readers_own(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", {"w": torch.ones(LARGE)})
    before = digest(path)
    with SafetensorsFile(path) as file:
        mine, other = file.read("w"), file.read("w")
    mine.add_(1)
    with SafetensorsFile(path) as file:
        assert torch.equal(file.read("w"), torch.ones(LARGE)) and digest(path) == before
    assert torch.equal(mine, torch.full(LARGE, 2.0)) and mine.is_contiguous()
    assert mine.untyped_storage().nbytes() == mine.nbytes, "a storage of its own, which nothing else keeps"
    del other


def test_a_model_is_mapped_only_where_nothing_is_converted(folder: Path) -> None:
    large = [n for n, p in load_model(folder).named_parameters() if p.nbytes >= safetensor.MAPPED]
    as_stored, converted = load_model(folder), load_model(folder, torch.float32)
    assert large and all(is_mapped(as_stored.get_parameter(n)) for n in large)
    assert as_stored.lm_head.weight is as_stored.embed.weight
    assert not any(is_mapped(p) for p in converted.parameters())
    assert all(torch.equal(p.float(), converted.get_parameter(n)) for n, p in as_stored.named_parameters())


def test_training_and_saving_in_place_leave_the_file_as_it_was(folder: Path, tmp_path: Path) -> None:
    path = folder / "model.safetensors"
    before, model = digest(path), load_model(folder)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    tokens = torch.randint(0, 512, (2, 16), generator=torch.Generator().manual_seed(0))
    model(tokens).float().log_softmax(-1)[..., 3].mean().backward()
    optimizer.step()
    assert digest(path) == before
    assert not torch.equal(model.embed.weight, load_model(folder).embed.weight)
    save_model(model, folder)  # over the file that it is mapped from
    again = load_model(folder)
    assert all(torch.equal(p, again.get_parameter(n)) for n, p in model.named_parameters())


def test_freed_tensors_are_forgotten(folder: Path) -> None:
    gc.collect()
    before = mapped_bytes()
    model = load_model(folder)
    assert mapped_bytes() - before >= model.embed.weight.nbytes
    del model
    gc.collect()
    assert mapped_bytes() == before


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_memory_is_taken_as_it_is_read_and_given_back_tensor_by_tensor(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", {n: torch.ones(16 << 20, dtype=torch.uint8) for n in "abcd"})
    code = f"""
import re, torch
from modicum.model.safetensor import SafetensorsFile

def resident():  # MiB
    return int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

torch.ones(1 << 20, dtype=torch.uint8).sum()
start = resident()
with SafetensorsFile({str(path)!r}) as file:
    kept = [file.read(n) for n in "abcd"]
    mapped = resident()
    sums = [int(t.sum()) for t in kept]
    read = resident()
    del kept[1:]
    print(mapped - start, read - start, resident() - start)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    mapped, read, one = map(float, out.split())
    assert mapped < 4 and 60 < read < 75 and 14 < one < 26
