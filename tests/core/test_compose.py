"""One resolver: what is refused, by name, and with what to type instead."""

from __future__ import annotations

import pytest

from modicum.core import compose, registry
from modicum.core.choice import Choice
from modicum.core.errors import UserError
from modicum.pipeline.recipe import parse


@pytest.mark.parametrize(
    "override,words",
    [
        (
            "pretrain.optimizer=refactor-reset",
            ["'refactor-reset'", "requires factors", "pretrain.form=lora or"],
        ),
        ("pretrain.objective=meco", ["'meco'", "document_mask", "pretrain.packing=concat:mask=true"]),
        ("pretrain.objective=ul2", ["'ul2'", "reserved_tokens", "curate.reserved=103"]),
        ("adapt.form=int4", ["'int4'", "requires trainable", "adapt.form="]),
        ("compress.forms=[lora]", ["'lora'", "compressing", "int4:group=64"]),
        ("compress.forms=[sltrain]", ["'sltrain'", "requires fit", "int4:group=64"]),
        ("pretrain.form=int4", ["'int4'", "requires trainable"]),
        ("pretrain.optimizer=galore:per_layer=true", ["'galore'", "step_gradients", "set clip=0"]),
        ("pretrain.memory=[mesa,recompute]", ["'mesa'", "'recompute'", "name one"]),
    ],
)
def test_a_recipe_that_cannot_work_is_refused_when_it_is_read(override: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        parse({}, [override])
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_the_same_pairs_with_what_they_ask_for_are_accepted() -> None:
    parse({}, ["pretrain.optimizer=refactor-reset", "pretrain.form=sltrain"])
    parse({}, ["pretrain.objective=meco", "pretrain.packing=concat:mask=true"])
    parse({}, ["pretrain.objective=ul2", "curate.reserved=103"])


def test_requirements_are_met_by_others_and_never_by_oneself() -> None:
    alone = compose.Member("a", provides=frozenset({"x"}), requires=frozenset({"x"}))
    with pytest.raises(UserError, match="a requires x"):
        compose.resolve([alone])
    compose.resolve([alone, compose.setting("b", provides={"x"})])


def test_conflicts_hold_in_either_order_and_spare_oneself() -> None:
    touchy = compose.Member("a", provides=frozenset({"x"}), conflicts=frozenset({"x"}))
    other = compose.setting("b", provides={"x"}, remedy="set b=0")
    compose.resolve([touchy])
    for pair in ([touchy, other], [other, touchy]):
        with pytest.raises(UserError, match=r"a cannot be combined with b; set b=0"):
            compose.resolve(pair)


def test_a_port_or_a_method_can_be_named_as_a_conflict() -> None:
    form = compose.member("linear", "lora:rank=2")
    for word in ("linear", "linear/lora"):
        with pytest.raises(UserError, match="linear 'lora' cannot be combined with b"):
            compose.resolve([form, compose.setting("b", conflicts={word})])
    compose.resolve([form, compose.setting("b", conflicts={"linear/int8"})])


def test_every_word_of_a_method_is_known_and_read() -> None:
    """A word that is required or refused somewhere is provided somewhere, by a method or by a setting."""
    settings = {"fsdp", "compile", "gqa", "sliding_window", "prefix_cache", "chunked_prefill", "reserved_tokens"}
    settings |= {"eviction", "speculative_decoding"}  # of an engine's policy and drafter, which say so in other words
    settings |= {"calibration_text", "pre_norm"}  # of what a model is compressed with, and of its layers
    ports = set(registry.ports())
    provided, asked = set(settings), set()
    for port in ports:
        for key in registry.methods(port):
            cls = registry.load(port, key).cls
            provided |= cls.provides
            asked |= cls.requires | cls.conflicts
            named = {w for w in cls.provides | cls.requires | cls.conflicts if w.partition("/")[0] not in ports}
            assert named <= set(compose.CAPABILITIES), f"{port}/{key}: {named - set(compose.CAPABILITIES)}"
    by_knob = {"document_mask"}  # provided by packing=concat:mask=true
    assert {w for w in asked if w.partition("/")[0] not in ports} <= provided | by_knob


def test_the_providers_of_a_word_are_read_as_text_and_are_those_of_the_classes() -> None:
    for word in compose.CAPABILITIES:
        for port in registry.ports():
            found = registry.providers(word).get(port, [])
            wanted = [key for key in registry.methods(port) if word in registry.load(port, key).cls.provides]
            assert found == wanted, f"{word}: {port}"


def test_what_a_method_brings_is_added_once(monkeypatch: pytest.MonkeyPatch) -> None:
    halves = (Choice.parse("memory", "cce"), Choice.parse("averaging", "lawa:window=0.3"))
    monkeypatch.setattr(compose, "brings", lambda port, key: halves if key == "meco" else ())
    meco = Choice.parse("objective", "meco")
    assert compose.complete([meco]) == [meco, *halves]
    chosen = Choice.parse("memory", "cce:eps=0")
    assert compose.complete([meco, chosen]) == [meco, chosen, halves[1]]


def test_what_was_chosen_keeps_out_what_is_brought_where_a_port_takes_one_method(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    halves = (Choice.parse("memory", "cce"), Choice.parse("averaging", "lawa"))
    monkeypatch.setattr(compose, "brings", lambda port, key: halves if key == "meco" else ())
    chosen = [Choice.parse("objective", "meco"), Choice.parse("averaging", "none"), Choice.parse("memory", "mesa")]
    assert compose.complete(chosen) == [*chosen, halves[0]]  # memory takes several
