"""Attention patterns as part of a model: said, counted, trained, stored, cached, served."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from modicum.core.errors import UserError
from modicum.model.attend import BlockAttend
from modicum.model.config import llama_like
from modicum.model.decoder import Decoder
from modicum.model.folder import load_model, save_model
from modicum.model.generate import greedy
from modicum.model.patterns import pattern, set_attention, with_attention
from modicum.serve.config import EngineConfig
from modicum.serve.engine import Engine
from modicum.serve.request import SamplingParams

LAMBDA = "lambda:window=5,sinks=2"
SHAPE = llama_like(97, 32, 3, heads=4, kv_heads=2, context_length=128)
TOKENS = (torch.arange(2 * 29) * 31 % 97).view(2, 29)


def decoder(attention: object = LAMBDA) -> Decoder:
    model = Decoder(with_attention(SHAPE, attention), torch.Generator().manual_seed(0)).eval()
    with torch.no_grad():  # so that what is seen shows in the logits
        for p in model.parameters():
            p.mul_(3 if p.dim() == 2 else 1)
    return model


def by_hand(model: Decoder, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of a model whose every layer has LAMBDA, token by token masks written out."""
    T = tokens.shape[1]
    q, k = torch.arange(T)[:, None], torch.arange(T)[None]
    seen = (k <= q) & ((q - k < 5) | (k < 2))

    def attend(layer, q_BHTE, k_BGSE, v_BGSE, *, window, scale, softcap, pattern):
        k_BHSE, v_BHSE = (x.repeat_interleave(2, 1) for x in (k_BGSE, v_BGSE))
        scores = (q_BHTE @ k_BHSE.transpose(-1, -2) * scale).masked_fill(~seen, float("-inf"))
        return scores.softmax(-1) @ v_BHSE

    return model(tokens, attend=attend)


def test_a_pattern_is_said_in_the_terms_of_the_model():
    window = with_attention(SHAPE, "sliding:window=7")
    assert window.window == 7 and window.attention is None and window.family == "mistral" and not window.overrides
    turns = with_attention(SHAPE, ["sliding:window=7", "causal"])
    assert [layer.window for layer in turns.per_layer] == [7, None, 7] and turns.family == "modicum"
    arms = with_attention(turns, LAMBDA)
    assert arms.attention == LAMBDA and arms.window is None and arms.family == "modicum"
    assert dataclasses.replace(with_attention(arms, "causal"), family="llama") == SHAPE
    assert with_attention(SHAPE, "causal") is SHAPE
    assert llama_like(97, 32, 3, heads=4, attention=["causal", LAMBDA]).per_layer[1].attention == LAMBDA
    for choices, message in (([], "0 attention patterns"), (["causal"] * 4, "4 attention"), ("slidin", "'sliding'")):
        with pytest.raises(UserError, match=message):
            with_attention(SHAPE, choices)


def test_flops_count_what_is_seen():
    seen = pattern(LAMBDA).keys_per_query(29)
    less = 4 * 3 * SHAPE.heads * SHAPE.head_dim * (30 / 2 - seen)
    assert SHAPE.flops_per_token(29) - with_attention(SHAPE, LAMBDA).flops_per_token(29) == pytest.approx(less)


def test_every_way_to_attend_sees_the_same():
    model = decoder()
    with torch.no_grad():
        expected = by_hand(model, TOKENS)
        torch.testing.assert_close(model(TOKENS), expected, atol=1e-4, rtol=1e-4)
        assert (decoder("causal")(TOKENS) - expected).abs().max() > 0.1
        # Two documents in a row, and a row that is padded on the left: patterns count from a document's start.
        documents = torch.tensor([0] * 13 + [1] * 16).expand(2, -1)
        packed = model(TOKENS, documents_BT=documents)
        torch.testing.assert_close(packed[:, 13:], by_hand(model, TOKENS[:, 13:]), atol=1e-4, rtol=1e-4)
        mask = torch.ones_like(TOKENS, dtype=torch.bool)
        mask[1, :6] = False
        padded = model(TOKENS, mask_BT=mask)
        torch.testing.assert_close(padded[1:, 6:], by_hand(model, TOKENS[1:, 6:]), atol=1e-4, rtol=1e-4)


def test_gradients_are_those_of_the_mask():
    model = decoder().double()
    grads = []
    for logits in (model(TOKENS), by_hand(model, TOKENS)):
        model.zero_grad()
        logits.square().mean().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-7)


def test_cached_generation_of_padded_prompts():
    model = decoder()
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[1, :7] = False
    answers = greedy(model, TOKENS[:, :20], 7, eos_ids=(), mask_BT=mask)
    for row, first in ((0, 0), (1, 7)):
        tokens = TOKENS[row : row + 1, first:20]
        for _ in range(7):
            tokens = torch.cat([tokens, by_hand(model, tokens)[:, -1:].argmax(-1)], 1)
        assert answers[row, -7:].tolist() == tokens[0, -7:].tolist()


def test_folder_and_given_models(tmp_path):
    model = decoder(["sliding:window=6", LAMBDA])
    save_model(model, tmp_path / "m")
    again = load_model(tmp_path / "m")
    assert again.config == model.config and torch.equal(again(TOKENS), model(TOKENS))
    plain = decoder("causal")
    set_attention(plain, ["sliding:window=6", LAMBDA])
    assert plain.config == model.config and torch.equal(plain(TOKENS), model(TOKENS))


@pytest.mark.parametrize("drafter", ["none", "prompt-lookup"])
def test_the_engine_serves_what_was_trained(drafter):
    model = decoder(["causal", LAMBDA, "sliding:window=6"])
    prompts = [TOKENS[0, :n].tolist() for n in (29, 3, 17, 28)] + [[5, 6, 7, 8] * 5]
    settings = EngineConfig(block_size=4, cache="192tok", max_batch_tokens=24, drafter=drafter, draft_when="always")
    engine = Engine(model, None, settings)
    for prompt, answer in zip(
        prompts, engine.generate(prompts, SamplingParams(max_tokens=9, temperature=0)), strict=True
    ):
        assert answer.tokens == greedy(model, torch.tensor([prompt]), 9, eos_ids=())[0, -9:].tolist()


def test_an_engine_may_give_a_model_another_pattern():
    plain, prompt = decoder("causal"), TOKENS[0, :20].tolist()
    settings = EngineConfig(block_size=4, cache="64tok", attention=[LAMBDA, "sliding:window=6"])
    answer = Engine(plain, None, settings).generate([prompt], SamplingParams(max_tokens=5, temperature=0))[0]
    expected = greedy(decoder([LAMBDA, "sliding:window=6"]), torch.tensor([prompt]), 5, eos_ids=())
    assert answer.tokens == expected[0, -5:].tolist()


def test_what_cannot_goes_says_so():
    from modicum.model.gguf.architectures import require
    from modicum.serve.native.support import unserved

    model = decoder()
    assert unserved(model, torch.float32) == f"the attention pattern {LAMBDA}"
    with pytest.raises(UserError, match=r"attention pattern.*kv=full"):
        Engine(model, None, EngineConfig(kv="snapkv"))
    with pytest.raises(UserError, match="attention='lambda"):
        require(dataclasses.replace(model.config, family="llama"))
    with pytest.raises(ValueError, match="of its own"):
        model(TOKENS, attend=BlockAttend(pattern("sliding:window=3")))
