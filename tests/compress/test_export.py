"""Export: what is stored how, the tokenizer's metadata, and llama.cpp computing the same as this package."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from modicum.cli import app
from modicum.core.errors import UserError
from modicum.data.gguf_vocabulary import vocabulary
from modicum.data.tokenizer import Tokenizer
from modicum.model.attach import attach, merge
from modicum.model.decoder import Decoder
from modicum.model.families import read_config
from modicum.model.folder import load_model, save_model
from modicum.model.generate import greedy
from modicum.model.gguf.write import Types, write

V = 320
LLAMA: dict[str, Any] = dict(
    model_type="llama", vocab_size=V, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
)  # fmt: skip
GEMMA = LLAMA | dict(head_dim=24, query_pre_attn_scalar=24, sliding_window=6, tie_word_embeddings=True)
LLAMA3 = dict(rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32)  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "llama-bias-tied": LLAMA | dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True, head_dim=32),
    "llama-llama3": LLAMA | dict(rope_parameters=LLAMA3),
    "llama-linear": LLAMA | dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=2.0)),
    "llama-yarn": LLAMA
    | dict(rope_parameters=dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=32)),
    "mistral": LLAMA | dict(model_type="mistral", sliding_window=None),
    "qwen2": LLAMA | dict(model_type="qwen2", tie_word_embeddings=True),
    "qwen3": LLAMA | dict(model_type="qwen3", head_dim=32),
    "smollm3": LLAMA | dict(model_type="smollm3", num_hidden_layers=4),
    "olmo2": LLAMA | dict(model_type="olmo2", tie_word_embeddings=True),
    "phi3": LLAMA | dict(model_type="phi3", sliding_window=None),
    "phi3-partial": LLAMA
    | dict(model_type="phi3", rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5)),
    "gemma": GEMMA | dict(model_type="gemma"),
    "gemma2": GEMMA | dict(model_type="gemma2", attn_logit_softcapping=3.0, final_logit_softcapping=2.0),
    "gemma3": GEMMA | dict(model_type="gemma3_text", num_hidden_layers=7, rope_theta=1e5),
    "gpt2": dict(model_type="gpt2", vocab_size=V, n_embd=64, n_layer=2, n_head=4, n_positions=128, n_inner=96),
    "gpt_neox": LLAMA | dict(model_type="gpt_neox", hidden_act="gelu_new", rotary_pct=0.5),
    "gpt_neox-serial": LLAMA | dict(model_type="gpt_neox", hidden_act="gelu_new", use_parallel_residual=False),
}
VARIED = (
    "Plain words, it's we'll DON'T; 3.14 12345 1,000,000\t\ttabs\n\n\n   indented\r\n  def f(x):\n\treturn x**2  \n",
    "Ça va? naïve Straße дом عربى हिन्दी 漢字かな交じり文 🙂👍🏽 ½ ² Ⅷ £€ …—“quotes”  trailing   ",
    "\n1\n\n2 !!?? ---  a-b_c/d\\e {json: [1, 2]} <tag attr='x'/> http://example.org/?q=1&r=2",
)
llama_cpp = pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python not installed")


def decoder(hf: dict[str, Any]) -> Decoder:
    """A small model with values in its biases and norms too, so that a forgotten one shows."""
    generator = torch.Generator().manual_seed(1)
    model = Decoder(read_config(hf), generator).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.3 if parameter.dim() == 1 else 0.1
            parameter.add_(torch.randn(parameter.shape, generator=generator) * spread)
    return model


def run(file: Path, **request: Any) -> dict[str, Any]:
    """llama.cpp in a process of its own."""
    asked = json.dumps({"texts": [], "prompts": [], "tokens": 0} | request)
    script = str(Path(__file__).with_name("llama_run.py"))
    done = subprocess.run([sys.executable, script, str(file)], input=asked, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([Path(__file__).read_text(), *VARIED], vocab_size=V)


@llama_cpp
@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_computes_the_same(case: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = decoder(CASES[case])
    words, _ = vocabulary(tokenizer, V)
    write(model, tmp_path / "a.gguf", Types(matrices="f32"), vocabulary=words)
    prompt = torch.randint(3, V, (1, 40), generator=torch.Generator().manual_seed(3))
    got = run(tmp_path / "a.gguf", prompts=[prompt[0].tolist()])
    with torch.no_grad():
        want = model(prompt)[0, -1]
    error = (torch.tensor(got["logits"][0]) - want).norm() / want.norm()
    # ggml's tanh approximation of GELU looks values up in a table of float16
    assert error < (2e-3 if model.config.activation == "gelu_tanh" else 1e-4)
