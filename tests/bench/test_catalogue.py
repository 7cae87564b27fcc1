"""Cards read as text, and the catalogue made from them and from records."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from test_record import AXES, lab, make

from modicum.bench import card, catalogue, figures, overview, pages, record, stats
from modicum.core import registry
from modicum.core.errors import UserError
from modicum.core.registry import MethodInfo

METHOD = '''"""toy: does a thing
over two lines.

More words.

    y = x

Doe and Roe 2023, arXiv:2301.00001, section 2; later Poe et al. 2024, arXiv:2402.00002.
"""

CLAIM = {"figure": "half the bytes", "where": "Table 1", "scale": "7B"}
SWEEP = ("rank=4", "rank=8")


@dataclass(frozen=True, kw_only=True)
class Base:
    seed: int = 0   # of the draw


@dataclass(frozen=True, kw_only=True)
class Config(Base):
    rank: Annotated[int, Field(ge=1, le=9)] = 8   # of the update
    names: list[str] = field(default_factory=list)
    path: str


class Toy(Thing):
    provides = frozenset({"b", "a"})
'''


def read(tmp_path: Path, text: str) -> card.Card:
    (tmp_path / "toy.py").write_text(text)
    return card.read_card(MethodInfo("linear", "toy", "does a thing", "nowhere", tmp_path / "toy.py"))


def test_card_of_a_file(tmp_path: Path) -> None:
    found = read(tmp_path, METHOD)
    assert found.summary == "does a thing over two lines"
    assert [(k.name, k.type, k.default, k.note) for k in found.knobs] == [
        ("seed", "int", "0", "of the draw"),
        ("rank", "int, ge=1, le=9", "8", "of the update"),
        ("names", "list[str]", "[]", ""),
        ("path", "str", "", ""),
    ]
    assert found.capabilities["provides"] == ("a", "b") and found.sweep == ("rank=4", "rank=8")
    assert found.paper == ("Doe and Roe 2023", "https://arxiv.org/abs/2301.00001")
    assert card.claim_text(found.claim) == "half the bytes (Table 1; 7B)"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            '{"figure": "half the bytes", "where": "Table 1", "scale": "7B"}',
            "make_claim()",
            "CLAIM must be written out",
        ),
        ('"figure"', '"figures"', "CLAIM="),
        ('("rank=4", "rank=8")', "4", "SWEEP=4"),
        ('("rank=4", "rank=8")', '{"rank": 4}', "SWEEP={'rank': 4}"),
        ('"scale": "7B"}', '"change": "half"}', "CLAIM="),
        ("class Toy(", "class Toy((", "is not Python"),
    ],
)
def test_a_wrong_card_is_told(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(tmp_path, METHOD.replace(old, new))


def test_sweep_may_be_values_by_knob(tmp_path: Path) -> None:
    text = METHOD.replace('("rank=4", "rank=8")', '{"rank": (4, 8), "scaled": (True, False)}')
    assert read(tmp_path, text).sweep == tuple(f"rank={r},scaled={s}" for r in (4, 8) for s in (True, False))


def test_claim_may_hold_numbers(tmp_path: Path) -> None:
    text = METHOD.replace('"scale": "7B"}', '"change": -0.1, "cost_ratio": 0.5}')
    assert read(tmp_path, text).claim == {
        "figure": "half the bytes",
        "where": "Table 1",
        "change": -0.1,
        "cost_ratio": 0.5,
    }


def test_claim_may_be_a_string(tmp_path: Path) -> None:
    text = METHOD.replace('{"figure": "half the bytes", "where": "Table 1", "scale": "7B"}', '"faster"')
    assert read(tmp_path, text).claim == {"figure": "faster"}


@pytest.mark.parametrize("port", registry.ports())
def test_knobs_read_as_text_are_those_of_the_class(port: str) -> None:
    import dataclasses

    for key, info in registry.methods(port).items():
        loaded = registry.load(port, key)
        found = card.read_card(info)
        assert [k.name for k in found.knobs] == [f.name for f in dataclasses.fields(loaded.config)], f"{port}/{key}"
        cls = loaded.cls
        for words, literal in found.capabilities.items():
            assert set(literal) == set(getattr(cls, words)), f"{port}/{key}: {words}"
        for knob, field in zip(found.knobs, dataclasses.fields(loaded.config), strict=True):
            needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            assert bool(knob.default) != needed, f"{port}/{key}: {knob.name}"


@pytest.mark.parametrize("port", registry.ports())
def test_protocol_text_names_what_a_method_must_do(port: str) -> None:
    import inspect

    text = card.port_text(registry.port(port))
    base = registry.base_class(port)
    for name, value in vars(base).items():
        if inspect.isfunction(value) and not name.startswith("_"):
            assert f"def {name}(" in text, name
    assert text.startswith(f"port {port}: ")


def checkout(tmp_path: Path) -> Path:
    (tmp_path / "README.md").write_text("# title\n\nWords.\n")
    records = []
    for seed in range(3):
        for method, loss, bytes_ in (("adamw", 2.0, 800.0), ("half", 1.9, 400.0)):
            records.append(make(method, seed, loss + seed / 100, bytes_, baseline="adamw", claim={"figure": "0.5x"}))
    for entry in records:
        record.append(tmp_path / "evidence", entry)
    return tmp_path


def test_catalogue_is_written_once_and_goes_stale(tmp_path: Path) -> None:
    home = checkout(tmp_path)
    changed = catalogue.write(home)
    assert home / "README.md" in changed and home / "docs/methods/optimizer.md" in changed
    assert not catalogue.stale(home) and not catalogue.write(home)
    text = (home / "README.md").read_text()
    assert text.startswith("# title\n\nWords.\n") and text.count(catalogue.BEGIN) == 1
    for port in registry.ports():
        line = next(line for line in text.splitlines() if line.startswith(f"| [{port}](docs/methods/{port}.md)"))
        assert line.endswith(f" | {registry.port(port).baseline} | {len(registry.methods(port))} |")
    (home / "README.md").write_text(text.replace("Words.", "Other words."))
    assert not catalogue.stale(home), "the words around are the writer's own"
    record.append(home / "evidence", make("adamw", 3, 2.5, 800.0, baseline="adamw"))
    assert set(catalogue.stale(home)) == {
        home / "docs/methods/index.html",
        home / "docs/methods/optimizer.md",
        home / "docs/methods/plots/optimizer.svg",
    }
    (home / "docs" / "methods" / "gone.md").write_text("a port of the past")
    assert home / "docs/methods/gone.md" in catalogue.stale(home)
    catalogue.write(home)
    assert not (home / "docs" / "methods" / "gone.md").exists() and not catalogue.stale(home)


def test_page_holds_protocol_cards_and_figures(tmp_path: Path) -> None:
    home = checkout(tmp_path)
    files = pages.port_files(registry.port("optimizer"), home / "docs/methods", home / "evidence")
    page = files[home / "docs/methods/optimizer.md"]
    assert (
        "### adamw (baseline)" in page
        and "train/optimizers/__init__.py" in page
        and "| `beta1` | `float` | `0.9` |" in page
    )
    assert "| half | 1.91 ± 0.01 | −5% [−5%, −5%] | 400 B | ×0.5 | 1.5 | better | 0.5x |" in page
    assert "plots/optimizer.svg" in page and (home / "docs/methods/plots/optimizer.svg") in files
    assert "commit abc" in page and "Tier laptop; seeds 0, 1, 2" in page


def test_page_of_a_smoke_lab_prints_no_change_and_no_plot(tmp_path: Path) -> None:
    for entry in [
        make(m, s, v, lab=lab(tier="smoke"), baseline="adamw") for m, v in (("adamw", 2), ("half", 1)) for s in (0, 1)
    ]:
        record.append(tmp_path / "evidence", entry)
    files = pages.port_files(registry.port("optimizer"), tmp_path, tmp_path / "evidence")
    page = files[tmp_path / "optimizer.md"]
    assert "| half | 1 | 100 B | 1.5 | shows that it runs |" in page and "Tier smoke (shows that it runs)" in page
    assert (
        len(files) == 1
        and "change" not in page.partition("## Methods")[0]
        and "×" not in page.partition("## Methods")[0]
    )


def test_overview_has_every_method_and_what_was_measured(tmp_path: Path) -> None:
    home = checkout(tmp_path)
    text = overview.page(home / "evidence")
    rows = json.loads(text.partition("const rows = ")[2].partition(";\nconst columns")[0].replace("<\\/", "</"))
    assert {(r["port"], r["key"]) for r in rows} == {(p, k) for p in registry.ports() for k in registry.methods(p)}
    (half,) = (r for r in rows if r["key"] == "adamw")
    assert half["verdict"] == "baseline" and half["tier"] == "laptop" and half["seeds"] == 3 and "gain" not in half
    unmeasured = next(r for r in rows if r["key"] == "galore")
    assert unmeasured["verdict"] == "not measured yet" and "quality" not in unmeasured
    reason = next(r for r in rows if r["port"] == "task" and r["key"] == "piqa")
    assert reason["verdict"] == "not measurable here" and reason["why"]
    for outside in ("src=", "@import", "url(", "fetch(", "<link"):
        assert outside not in text, "the page is complete in itself"


def test_overview_signs_gains_by_what_is_better(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    higher = {"quality": AXES["quality"] | {"better": "higher"}, "cost": AXES["cost"] | {"better": "higher"}}
    for seed in range(3):
        for method, loss, cost in (("adamw", 2.0, 100.0), ("galore", 2.1, 50.0)):
            record.append(tmp_path, make(method, seed, loss, cost, baseline="adamw", axes=AXES))
        for method, loss, cost in (("full", 2.0, 100.0), ("snapkv", 2.1, 50.0)):
            record.append(tmp_path, make(method, seed, loss, cost, baseline="full", axes=higher, lab=lab(port="kv")))
    found = {r["key"]: r for port in ("optimizer", "kv") for r in overview.rows_of(registry.port(port), tmp_path)}
    assert found["galore"]["gain"] == pytest.approx(-0.05) and found["snapkv"]["gain"] == pytest.approx(0.05)
    assert found["galore"]["saving"] == pytest.approx(0.5) and found["snapkv"]["saving"] == pytest.approx(2.0)
    assert found["galore"]["verdict"] == "worse" and found["snapkv"]["verdict"] == "better"


def test_only_one_marker_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="only one of"):
        catalogue.readme(f"x\n{catalogue.BEGIN}\n")


def test_each_lab_is_a_table_of_its_own() -> None:
    old = [make(m, lab=lab("1"), loss=v, time="2026-01-01") for m, v in (("base", 2.0), ("m", 1.0), ("n", 1.0))]
    new = [make(m, lab=lab("2"), loss=v, time="2026-01-02") for m, v in (("base", 4.0), ("m", 3.0))]
    alone = [make("m", lab=lab("3"), loss=9.0, time="2026-01-03")]
    toy = [make(m, lab=lab("4", tier="smoke"), loss=1.0, time="2026-01-04") for m in ("base", "m")]
    found = figures.comparisons(old + new + alone + toy)
    assert [group[0].lab.id for group in found] == ["2", "1", "4"], "higher tiers first, in them the newest"
    values = {
        (g[0].lab.id, row.choice): row.quality_ratio for g, rows in figures.of_method(old + new, "m") for row in rows
    }
    assert values == {("2", "m"): 0.75, ("1", "m"): 0.5}
    assert [g[0].lab.id for g in figures.comparisons(old[:2] + new)] == ["2"], "the newer one holds all of the old"


def test_row_text() -> None:
    records = [make(m, s, v + s / 10, c) for m, v, c in (("base", 2.0, 100.0), ("m", 1.0, 30.0)) for s in range(2)]
    base, row = stats.compare(records)[0]
    assert figures.measured_text(base) == "loss 2.05 ± 0.071; state bytes 100 B; baseline"
    assert figures.measured_text(row) == "loss 1.05 ± 0.071, −49% [−49%, −49%]; state bytes 30 B, ×0.3; better"
    smoke = [dataclasses.replace(r, lab=lab(tier="smoke")) for r in records]
    text = "loss 1.05 ± 0.071; state bytes 30 B; shows that it runs"
    assert figures.measured_text(stats.compare(smoke)[0][1]) == text


@pytest.mark.parametrize(
    ("claim", "text"),
    [
        ({}, "better"),
        ({"cost_ratio": 0.3}, "claim met"),
        ({"cost_ratio": 0.29}, "claim missed"),
        ({"change": -0.48}, "claim met"),
        ({"change": -0.5}, "claim missed"),
        ({"change": -0.1, "cost_ratio": 0.2}, "claim missed"),
    ],
)
def test_verdict_holds_the_claim_against_the_measurement(claim: dict[str, float], text: str) -> None:
    records = [make(m, s, v + s / 10, c) for m, v, c in (("base", 2.0, 100.0), ("m", 1.0, 30.0)) for s in range(2)]
    claimed = [dataclasses.replace(r, claim={"figure": "x"} | claim) for r in records]
    assert figures.verdict(stats.compare(claimed)[0][1]) == text


def test_a_claim_of_cost_is_missed_by_what_is_worse_and_none_is_judged_where_the_baseline_fails() -> None:
    claim = {"figure": "half", "cost_ratio": 0.5}
    records = [make(m, s, v + s / 100, c, claim=claim) for m, v, c in (("base", 1, 9), ("m", 2, 1)) for s in range(3)]
    assert figures.verdict(stats.compare(records)[0][1]) == "claim missed"
    axes = {"quality": AXES["quality"] | {"better": "higher"}, "cost": AXES["cost"]}
    zero = [make(m, s, v, axes=axes) for m, v in (("base", 0.0), ("m", 0.1)) for s in range(3)]
    assert figures.verdict(stats.compare(zero)[0][1]) == "not measurable here: the baseline's loss is 0"


@pytest.mark.parametrize(("share", "text"), [(0.0314, "+3.1%"), (-0.5, "−50%"), (0.0, "±0%"), (12.0, "+1200%")])
def test_percent(share: float, text: str) -> None:
    assert figures.percent(share) == text


@pytest.mark.parametrize("port", registry.ports())
def test_show_fits_a_screen(port: str) -> None:
    evidence = record.folder(None)
    found = record.read(evidence, port)
    for key, info in registry.methods(port).items():
        lines = figures.screen(card.read_card(info), figures.of_method(found, key))
        assert len(lines) <= 40 and max(map(len, lines)) <= figures.WIDTH, f"{port}/{key}"
        assert lines[0].startswith(f"{key}: ") and lines[-1].startswith("file ")
        assert any(line.startswith("measured  ") for line in lines)
