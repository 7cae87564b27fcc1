"""Recipes as lists: stages that repeat, what each reads, and what a recipe may say of engine, base and calibration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from modicum.core.errors import UserError
from modicum.pipeline.context import stage_fingerprint
from modicum.pipeline.recipe import as_data, load, parse, resolved
from modicum.pipeline.rehearse import miniature

CONTINUED: dict[str, Any] = {
    "stages": [
        {"curate": {"vocab_size": 512}, "as": "old"},
        {"pretrain": {"tokens": "50ktok", "lr": 1e-3}, "as": "base"},
        {"curate": {"from": "old", "corpus": "python:numpy"}, "as": "new"},
        {"pretrain": {"from": ["base", "new"], "schedule": "rewarm"}, "as": "more"},
        "score",
        {"evaluate": {"from": ["more", "old"]}},
    ]
}


def test_a_stage_reads_the_latest_of_each_kind_or_what_from_names() -> None:
    recipe = parse(CONTINUED)
    assert [e.name for e in recipe.entries] == ["old", "base", "new", "more", "score", "evaluate"]
    assert recipe.sources("base") == {"corpus": ["old"], "model": []}  # from scratch: no model is named
    assert recipe.sources("more") == {"corpus": ["new"], "model": ["base"]}
    assert recipe.sources("score") == {"corpus": ["old", "new"], "model": ["base", "more"]}
    assert recipe.sources("evaluate") == {"corpus": ["old"], "model": ["more"], "variants": []}
    assert recipe.section("new").corpus == "python:numpy" and recipe.section("old").corpus == "python"


def test_variants_of_another_model_are_not_evaluated_with_this_one() -> None:
    stages = [{"curate": {}}, {"pretrain": {}, "as": "base"}, {"compress": {}}, {"evaluate": {}, "as": "first"}]
    recipe = parse({"stages": [*stages, {"pretrain": {"from": "base"}, "as": "more"}, {"evaluate": {}, "as": "last"}]})
    assert recipe.sources("first")["variants"] == ["compress"] and recipe.sources("last")["variants"] == []


def test_overrides_go_by_the_name_and_null_takes_a_stage_out() -> None:
    recipe = parse(CONTINUED, ["more.lr=3e-4", "evaluate=null", "score.bytes=10kB", "seed=3", "more.from=[base, old]"])
    assert recipe.section("more").lr == 3e-4 and recipe.section("base").lr == 1e-3
    assert recipe.section("score").bytes == 10_000 and recipe.seed == 3
    assert "evaluate" not in {e.name for e in recipe.entries}
    assert recipe.sources("more")["corpus"] == ["old"]
    assert CONTINUED["stages"][3]["pretrain"] == {"from": ["base", "new"], "schedule": "rewarm"}  # left as it was


def test_both_forms_are_kept_as_they_were_written(tmp_path: Path) -> None:
    listed, short = parse(CONTINUED), parse({"curate": {"heldout": 0.1}, "predict": None})
    assert [next(iter(s)) for s in as_data(listed)["stages"]][:2] == ["curate", "pretrain"]
    assert "stages" not in as_data(short) and as_data(short)["predict"] is None and "score" not in as_data(short)
    for recipe in (listed, short):
        (tmp_path / "run.yaml").write_text(resolved(recipe))
        again = load(tmp_path / "run.yaml")
        assert resolved(again) == resolved(recipe)
        assert {e.name: again.sources(e.name) for e in again.entries} == {
            e.name: recipe.sources(e.name) for e in recipe.entries
        }


def test_a_list_and_one_section_per_stage_that_say_the_same_have_the_same_fingerprints() -> None:
    short = parse({}, ["adapt.tokens=9ktok"])
    listed = parse({"stages": [{e.key: {"tokens": "9ktok"} if e.key == "adapt" else {}} for e in short.entries]})
    for entry in short.entries:
        assert stage_fingerprint(short, entry.name) == stage_fingerprint(listed, entry.name)


def test_a_change_reaches_what_is_made_from_it_and_nothing_else() -> None:
    base = parse(CONTINUED)

    def changed(*overrides: str) -> list[str]:
        other = parse(CONTINUED, overrides)
        return [e.name for e in base.entries if stage_fingerprint(base, e.name) != stage_fingerprint(other, e.name)]

    assert changed("more.lr=3e-4") == ["more", "score", "evaluate"]
    assert changed("new.heldout=0.2") == ["new", "more", "score", "evaluate"]
    assert changed("base.lr=2e-3") == ["base", "more", "score", "evaluate"]
    assert changed("evaluate.from=[base, old]") == ["evaluate"]


@pytest.mark.parametrize(
    "stages, says",
    [
        ([{"curate": {}}, {"curate": {}}], r"two stages are called 'curate'; .* as: NAME"),
        ([{"curat": {}}], "Did you mean 'curate'"),
        ([{"curate": {}, "pretrain": {}}], "is not a stage; write - KEY"),
        ([{"curate": {}, "as": "a b"}], "no name for a stage"),
        ([{"curate": {}, "as": "seed"}], "no name for a stage"),
        ([{"pretrain": {}}, {"curate": {}}], "put curate before pretrain"),
        ([{"curate": {}}, {"pretrain": {"from": "bass"}}], r"pretrain\.from.*'bass'"),
        ([{"curate": {}}, {"pretrain": {}}, {"evaluate": {"from": "evaluate"}}], r"evaluate\.from"),
        ([{"curate": {}, "as": "a"}, {"pretrain": {}}, {"curate": {}, "as": "b"}, {"evaluate": {"from": ["a", "b"]}}],
         "reads one corpus"),
        ([{"curate": {}, "as": "a"}, {"pretrain": {}, "as": "m"}, {"curate": {}, "as": "b"},
          {"pretrain": {"from": "m"}}], "text of another tokenizer; add to b: from: a"),
        ([{"curate": {}}, {"pretrain": {}, "as": "m"}, {"predict": {}}, {"pretrain": {"from": "m"}}], "has no law"),
        ([{"curate": {}}, {"predict": {}}], "remove predict"),
        ("curate", "must be a list"),
    ],
)  # fmt: skip
def test_a_list_that_cannot_work_is_refused_in_one_line(stages: Any, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        parse({"stages": stages})
    assert "\n" not in str(caught.value)


def test_an_override_of_a_stage_that_is_not_listed_names_those_that_are() -> None:
    with pytest.raises(UserError, match="Did you mean 'more'"):
        parse(CONTINUED, ["mor.lr=1"])
    with pytest.raises(UserError, match=r"Did you mean 'more\.lr'"):
        parse(CONTINUED, ["more.lrr=1"])


@pytest.mark.parametrize(
    "override, says",
    [
        ("serve.engine={kv: snapkw}", "Did you mean 'snapkv'"),
        ("serve.engine={kvs: full}", "Did you mean 'kv'"),
        ("evaluate.engine={activation_bits: 4}", "neither 16 nor 8"),
        ("serve.engine={kv: h2o}", r"engine: .*h2o.*prefix_cache=false"),
        ("evaluate.engine={drafter: nothing-like-it}", "drafter"),
        ("serve.engine={kv: h2o, prefix_cache: false, cache_form: kivi}", "engine: .*kivi.*h2o"),
        ("serve.engine={cache_form: 'int8:bitz=8'}", "bitz"),
        ("serve.engine=fast", "must be keys and values"),
        ("adapt.base=int4 adapt.form=dense", r"adapt\.base=int4 lies under an adapter"),
        ("adapt.base=sltrain", "sltrain"),
        ("adapt.base=int4", r"compress reads plain weights, and adapt leaves an adapter over int4"),
        ("pretrain.attention=slidng:window=64", "Did you mean 'sliding'"),
        ("curate.steps=[normalize]", "Did you mean 'normalise'"),
        ("pretrain.dtype=int8", "dtype"),
        ("pretrain.averaging=lava", "Did you mean 'lawa'"),
        ("adapt.optimiser=adamw", "Did you mean 'adapt.optimizer'"),
        ("adapt.memory=[mesa, recompute]", "name one"),
        ("evaluate.dtype=int8", r"evaluate\.dtype"),
    ],
)
def test_what_does_not_go_together_is_refused_when_a_recipe_is_read(override: str, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        parse({}, override.split(" ") if override.count("=") > 1 and "{" not in override else [override])
    assert "\n" not in str(caught.value)


def test_what_does_go_together_is_accepted() -> None:
    recipe = parse(
        {},
        [
            "serve.engine={kv: h2o, prefix_cache: false, activation_bits: 8}",
            "evaluate.engine={kv: full, scheduler: 'fcfs:reserve=0.05', drafter: prompt-lookup, max_length: 512}",
            "adapt.base=int4:group=32",
            "adapt.merge=true",
            "pretrain.attention=[sliding:window=64,causal]",
            "pretrain.parameters=5M",
            "pretrain.averaging=lawa",
            "adapt.optimizer=adamw:beta2=0.95",
            "adapt.memory=[cce]",
        ],
    )
    assert recipe.section("pretrain").parameters == 5e6 and recipe.section("pretrain").averaging == "lawa"
    assert recipe.section("adapt").memory == ["cce"]
    assert yaml.safe_load(resolved(recipe))["evaluate"]["engine"]["max_length"] == 512
    parse({}, ["adapt.base=int4", "compress=null"])


def test_the_miniature_has_each_stage_once_and_trains_a_model_for_who_names_a_published_one(tmp_path: Path) -> None:
    small, decisions = miniature(parse(CONTINUED), tmp_path)
    assert [e.name for e in small.entries] == ["curate", "pretrain", "score", "evaluate"]
    assert small.sources("pretrain")["model"] == [] and decisions["pretrain"]["tokens"] > 0
    stages = [{"curate": {}}, {"adapt": {"model": "smollm2"}}, {"evaluate": {}}]
    small, _ = miniature(parse({"stages": stages}), tmp_path)
    assert [e.name for e in small.entries] == ["curate", "pretrain", "adapt", "evaluate"]
    assert small.sources("adapt")["model"] == ["pretrain"]
