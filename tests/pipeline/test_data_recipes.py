"""The recipes select and curate-web at toy size: every stage for real."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pipeline_toys
import pytest

from modicum.data.curate import Curation
from modicum.pipeline.recipe import load
from modicum.pipeline.run import run_recipe


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


WORDS = ["the", "of", "and", "to", "that", "have", "with", "be", "report", "river", "council", "budget", "winter"]
WORDS += ["harbour", "engine", "letter", "morning"]


def sentences(seed: int, count: int) -> str:
    rng = random.Random(seed)
    out = []
    for _ in range(count):
        words = [rng.choice(WORDS) + (str(rng.randrange(99)) if rng.random() < 0.1 else "") for _ in range(14)]
        out.append(" ".join(words).capitalize() + ".")
    return " ".join(out)


def page(seed: int) -> bytes:
    paragraphs = "".join(f"<p>{sentences(seed * 100 + k, 6)}</p>" for k in range(4))
    return (
        "<html><head><title>Page</title></head><body><nav><a href='/'>Home</a></nav>"
        f"<article><h1>Report</h1>{paragraphs}<p>Write to user{seed}@mail.example.org now, and to the council.</p>"
        "</article></body></html>"
    ).encode()


def entry(url: str, body: bytes) -> bytes:
    http = b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\n\r\n" + body
    head = (
        f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: {url}\r\nWARC-Record-ID: <urn:uuid:1>\r\n"
        f"WARC-Date: 2024-01-01T00:00:00Z\r\nContent-Type: application/http; msgtype=response\r\n"
        f"Content-Length: {len(http)}\r\n\r\n"
    )
    return gzip.compress(head.encode() + http + b"\r\n\r\n")


def checksums(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != "curation.json" and not p.name.startswith(".")
    }


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_crawl_gives_the_same_shards_on_ray(tmp_path: Path) -> None:
    for package in ("ray", "fastwarc", "ftfy", "py3langid"):
        pytest.importorskip(package)
    crawl = tmp_path / "crawl"
    crawl.mkdir()
    for part in range(3):
        entries = b"".join(entry(f"https://site{k}.org/{part}", page(part * 10 + k)) for k in range(10))
        (crawl / f"{part}.warc.gz").write_bytes(entries)
    (crawl / "copy.html").write_bytes(page(3))
    german = "<html><body><article><p>" + "Ein Satz auf Deutsch über Züge. " * 60
    (crawl / "other.html").write_bytes(german.encode())
    knobs = (f"corpus={crawl}", "vocab_size=400", "heldout=0.2", "group_bytes=8kB")
    tiny = [f"{stage}.{knob}" for stage in ("web", "ray") for knob in knobs]
    run = run_recipe(load("curate-web", tiny), tmp_path / "run", notify=lambda line: None)
    made = [Curation.load(run.folder / "stages" / name / "data") for name in ("web", "ray")]
    assert checksums(made[0].folder) == checksums(made[1].folder)
    documents = [d for split in ("train", "heldout") for d in made[0].documents(split)]
    assert len(documents) == 30 and all("<EMAIL>" in d.text and "@" not in d.text for d in documents)
    assert all(d.source.startswith("https://site") and d.meta["language"] == "en" for d in documents)
    assert made[0].drops["language"] == {"language": 1} and sum(made[0].drops["exact-dedup"].values()) == 1


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_four_selections_of_one_target(tmp_path: Path) -> None:
    pools = {"pool": (0, 60), "examples": (500, 20), "target": (800, 12)}
    for name, (first, count) in pools.items():
        (tmp_path / name).mkdir()
        for i in range(count):
            special = name != "pool" or i % 6 == 0
            body = sentences(first + i, 20)
            (tmp_path / name / f"{i:02}.txt").write_text(
                body.replace("report", "matrix eigenvalue") if special else body
            )
    tenth = {"keep": 0.2, "sample": 40, "dims": 8}
    target = {"targets": [str(tmp_path / "examples")]}
    steps: dict[str, Any] = {
        "random-tenth": "random:keep=0.2",
        "betr-tenth": {"method": "betr", **tenth, **target},
        "gotd-tenth": {"method": "gotd", **tenth, **target},
        "preselect-tenth": {"method": "preselect", "keep": 0.2, "sample": 40, "characters": 400},
    }
    overrides = ["pool.vocab_size=400", "score.bytes=4kB", "budget.time=1h", "target.heldout=0.4"]
    overrides += [f"{n}.corpus={tmp_path / n}" for n in pools] + [f"{n}.corpus={tmp_path / 'pool'}" for n in steps]
    overrides += [f"{n}.steps={json.dumps(['normalise', step])}" for n, step in steps.items()]
    overrides += [f"{n}.max_bytes=null" for n in (*pools, *steps)] + [f"{n}.heldout=0.1" for n in steps]
    models = ("general", "special", "on-random", "on-betr", "on-gotd", "on-preselect")
    tiny = ("shape=[32, 1]", "tokens=8ktok", "sequence_length=64", "batch_tokens=256")
    overrides += [f"{name}.{knob}" for name in models for knob in tiny]
    run = run_recipe(load("select", overrides), tmp_path / "run", notify=lambda line: None)
    rows = json.loads((run.folder / "stages" / "score" / "done.json").read_text())["figures"]["rows"]
    assert {(r["model"], r["corpus"]) for r in rows} == {(m, c) for m in models[2:] for c in ("target", "pool")}
    made = Curation.load(run.folder / "stages" / "betr-tenth" / "data")
    texts = [d.text for split in ("train", "heldout") for d in made.documents(split)]
    assert sum("eigenvalue" in t for t in texts) >= 0.5 * len(texts), "a sixth at random"
    assert "not-selected" in (run.folder / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_pretrainers_guide_gives_a_table_of_effects_in_one_command(tmp_path: Path) -> None:
    """Every domain and two thresholds of quality, over two seeds; a second run trains nothing."""
    rng = random.Random(0)
    with open(tmp_path / "pool.jsonl", "w") as file:
        for domain in ("news", "letters"):
            for i in range(80):
                text = f"{domain} {i}: " + sentences(rng.randrange(10**6), 3)
                file.write(json.dumps({"text": text, "domain": domain, "date": f"{2012 + i % 5}-03-01"}) + "\n")
    overrides = [f"pool.corpus={tmp_path}/pool.jsonl", "pool.vocab_size=400", "pool.heldout=0.3"]
    overrides += [
        "pool.steps=[normalise, score]",
        "grid.tokens=2ktok",
        "grid.sequence_length=64",
        "grid.parameters=60k",
    ]
    overrides += ["grid.study={method: pretrainers-guide, quality: quality, quality_keep: [0.6], seeds: 2}"]
    overrides += ["grid.heldout_bytes=3kB"]
    recipe = load("pretrainers-guide", overrides)
    run_recipe(recipe, tmp_path / "run", notify=lambda line: None)
    figures = json.loads((tmp_path / "run/stages/grid/done.json").read_text())["figures"]
    assert [r["arm"] for r in figures["rows"]] == [
        "without letters",
        "without news",
        "quality 60%",
        "quality inverse 73%",
    ]
    assert figures["trials"] == 10 and all(r["target_interval"] > 0 for r in figures["rows"])
    without = {r["arm"]: r for r in figures["rows"]}["without news"]
    assert without["news"] > without["letters"]  # what was left out suffers most
    assert "quality inverse" in (tmp_path / "run/report.html").read_text()
    trials = [*(tmp_path / "run/stages/grid/trials").glob("*/run.json")]
    before = {p: p.stat().st_mtime_ns for p in trials}
    assert len(before) == 10
    again = load("pretrainers-guide", [*overrides[:-1], "grid.heldout_bytes=3kB", "budget.time=2h"])
    run_recipe(again, tmp_path / "run", notify=lambda line: None)
    assert {p: p.stat().st_mtime_ns for p in trials} == before


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_data4llm_leaves_each_cell_out_in_turn(tmp_path: Path) -> None:
    kinds = ("raw", "all-cells", "no-deduplication", "no-filtering", "no-selection", "no-synthesis")
    models = ("on-raw", "on-all", "without-mixing", *(f"without-{k.removeprefix('no-')}" for k in kinds[2:]))
    overrides = [f"{name}.max_bytes=700kB" for name in kinds] + ["raw.vocab_size=500", "score.bytes=3kB"]
    overrides += ["target.max_bytes=600kB", "raw.heldout=0.2", "all-cells.heldout=0.2"]
    tiny = ("shape=[32, 1]", "tokens=4ktok", "sequence_length=64", "batch_tokens=256")
    overrides += [f"{name}.{knob}" for name in models for knob in tiny]
    run = run_recipe(load("data4llm", overrides), tmp_path / "run", notify=lambda line: None)
    rows = json.loads((run.folder / "stages/score/done.json").read_text())["figures"]["rows"]
    assert {r["model"] for r in rows} == set(models) and rows[0]["model"] == "on-all"
    steps = {
        name: [s["name"] for s in json.loads((run.folder / f"stages/{name}/done.json").read_text())["figures"]["steps"]]
        for name in kinds
    }
    assert {"exact-dedup", "minhash", "quality", "dclm", "rewrite"} <= set(steps["all-cells"])
    for cell, gone in (("deduplication", "minhash"), ("filtering", "quality"), ("selection", "dclm")):
        assert set(steps["all-cells"]) - set(steps[f"no-{cell}"]) >= {gone}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_latent_thoughts_asks_the_teacher_and_then_the_model_of_an_earlier_stage(tmp_path: Path) -> None:
    """With random models, whose thoughts never end: the documents stay, and each says why it has none."""
    corpus = pipeline_toys.corpus(tmp_path / "corpus", "json", "textwrap", "heapq", "string")
    texts = [p.read_text() for p in corpus.iterdir()]
    model = pipeline_toys.chat_model(tmp_path / "model", texts)
    overrides = [f"{n}.corpus={corpus}" for n in ("raw", "few", "more")] + [
        f"{n}.max_bytes=null" for n in ("raw", "few", "more")
    ]
    overrides += [f"raw.tokenizer={model}", f"few.generator={model}", f"warm.model={model}", "score.bytes=2kB"]
    overrides += ["raw.heldout=0.3", "few.heldout=0.3", "more.heldout=0.3"]
    for name in ("warm", "second", "on-raw"):
        overrides += [f"{name}.tokens=1ktok", f"{name}.sequence_length=64", f"{name}.batch_tokens=128"]
    by = {"method": "latent-thoughts", "tokens": 40, "thought_tokens": 8}
    for name, more in (("few", {"teacher": True}), ("more", {"samples": 2})):
        steps = ["normalise", {"method": "rewrite", "by": by | more}]
        overrides.append(f"{name}.steps={json.dumps(steps)}")
    run = run_recipe(load("latent-thoughts", overrides), tmp_path / "run", notify=lambda line: None)
    for name in ("few", "more"):
        made = Curation.load(run.folder / "stages" / name / "data")
        assert made.drops["rewrite"]["no-thought"] >= 1 and set(made.drops["rewrite"]) <= {"no-thought", "no-reply"}
    rows = json.loads((run.folder / "stages/score/done.json").read_text())["figures"]["rows"]
    assert [r["model"] for r in rows] == ["warm", "second", "on-raw"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_climb_searches_a_mixture_of_clusters_for_the_text_of_another_corpus(tmp_path: Path) -> None:
    topics = {"sea": ["tide", "gull", "mast", "sail", "salt"], "law": ["clause", "judge", "motion", "ruling", "plea"]}
    rng = random.Random(0)
    for name, count in (("pool", 60), ("target", 30)):
        with open(tmp_path / f"{name}.jsonl", "w") as file:
            for topic, words in topics.items():
                for _ in range(count if name == "pool" or topic == "sea" else 0):
                    file.write(json.dumps({"text": " ".join(rng.choice(words) for _ in range(80))}) + "\n")
    overrides = [f"pool.corpus={tmp_path}/pool.jsonl", f"target.corpus={tmp_path}/target.jsonl", "pool.vocab_size=300"]
    overrides += ["pool.heldout=0.2", "target.heldout=0.4", "pool.max_bytes=null", "target.max_bytes=null"]
    overrides.append("pool.steps=[normalise, {method: cluster, clusters: 2, first: 8}]")
    for name, study in (("search", "climb:rounds=[4,2],top=8"), ("random", "random:runs=6")):
        overrides += [f"{name}.study={study}", f"{name}.tokens=8ktok", f"{name}.parameters=60k", f"{name}.lr=0.01"]
        overrides += [f"{name}.sequence_length=64", f"{name}.batch_tokens=256", f"{name}.heldout_bytes=4kB"]
    run = run_recipe(load("climb", overrides), tmp_path / "run", notify=lambda line: None)
    figures = {
        n: json.loads((run.folder / f"stages/{n}/done.json").read_text())["figures"] for n in ("search", "random")
    }
    made = Curation.load(run.folder / "stages/pool/data")
    sea = next(d.domain for d in made.documents("train") if "gull" in d.text)
    rows = [row for one in figures.values() for row in one["rows"]]
    assert len(rows) == 12 and all(one["trials"] == 6 for one in figures.values())
    pairs = np.array([(row[sea], row["loss"]) for row in rows])
    assert np.corrcoef(pairs.T)[0, 1] < -0.5  # the target is all sea
