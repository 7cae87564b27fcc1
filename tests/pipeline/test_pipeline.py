"""Pipeline: recipes, what is refused, and (slow) the whole walk with a kill in every stage."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pipeline_toys
import pytest

from modicum.budget import Cost
from modicum.core.errors import BudgetError, UserError
from modicum.core.events import read_events
from modicum.pipeline.context import Run, stage_fingerprint
from modicum.pipeline.models import with_models
from modicum.pipeline.named import recipes
from modicum.pipeline.plan import bill_text, require_fits
from modicum.pipeline.recipe import load, parse, resolved
from modicum.pipeline.run import check_folder

RECIPES = list(recipes().values())
STAGES = ("curate", "predict", "pretrain", "ground", "adapt", "compress", "serve", "evaluate")
SMALL = [
    "pretrain.tokens=120ktok",
    "pretrain.parameters=3e5",
    "curate.vocab_size=512",
    "curate.heldout=0.2",
    "adapt.tokens=20ktok",
    "adapt.pairs=200",
    "ground.passages=200",
    "ground.queries=20",
    "evaluate.bytes=20kB",
    "serve.max_tokens=8",
    "budget.time=1h",
    "pretrain.sequence_length=64",
    "adapt.sequence_length=64",
]
MODULES = ("json", "argparse", "textwrap", "heapq", "ast", "inspect", "typing", "random", "string", "shutil")
OWN = ["adapt.model=null", "adapt.grounded=0", "adapt.batch_tokens=1024", "ground.encoder=null", "fallback=null"]


def names(recipe):
    return [entry.name for entry in recipe.entries]


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_is_read_and_says_its_stages(path):
    recipe = load(path)
    assert recipe.entries[0].key == "curate"
    import yaml

    assert resolved(parse(yaml.safe_load(resolved(recipe)))) == resolved(recipe)


def test_a_model_that_cannot_be_had_is_refused_or_replaced_by_the_fallback(tmp_path):
    asked = {"adapt": {"model": str(tmp_path / "none"), "grounded": 0.5}}
    said: list[str] = []
    with pytest.raises(UserError, match=r"adapt\.model=.*none: no model at"):
        with_models(parse(asked), said.append)
    rescue = {"adapt.model": None, "adapt.grounded": 0.0, "pretrain.time": "2m"}
    found = with_models(parse(asked | {"fallback": rescue}), said.append)
    assert found.section("adapt").model is None and found.section("pretrain").time == 120 and not found.fallback
    assert len(said) == 1 and "adapt.model=null" in said[0] and "\n" not in said[0]
    assert with_models(found, said.append) == found and len(said) == 1
    with pytest.raises(UserError, match=r"fallback: .*adapt\.modle"):
        with_models(parse(asked | {"fallback": {"adapt.modle": None}}), said.append)


@pytest.mark.parametrize(
    "override, says",
    [
        ("pretrain.tokes=5", "Did you mean 'pretrain.tokens'"),
        ("pretrian.tokens=5", "Did you mean 'pretrain'"),
        ("pretrain.time=5GiB", "a time such as"),
        ("pretrain.optimizer=adamv", "Did you mean 'adamw'"),
        ("pretrain.optimizer=adamw:beta9=1", "Did you mean 'beta"),
        ("curate.heldout=2", "not valid"),
        ("nothing", "KEY=VALUE"),
        ("corpus.deep=1", "has no keys inside"),
    ],
)
def test_a_wrong_override_is_explained_in_one_line(override, says):
    with pytest.raises(UserError, match=says) as caught:
        parse({"corpus": "python"}, [override])
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


def test_a_missing_recipe_names_those_that_are_there(tmp_path):
    (tmp_path / "mine.yaml").write_text("corpus: python")
    with pytest.raises(UserError, match=r"mine\.yaml"):
        load(tmp_path / "yours.yaml")
    (tmp_path / "broken.yaml").write_text("corpus: [")
    with pytest.raises(UserError, match="not a YAML file"):
        load(tmp_path / "broken.yaml")


def test_a_stage_without_the_one_it_reads_is_refused():
    with pytest.raises(UserError, match="serve but not ground"):
        parse({}, ["ground=null"])
    assert names(parse({}, ["ground=null", "serve=null", "predict=null"])) == [
        s for s in STAGES if s not in ("predict", "ground", "serve")
    ]


def test_fingerprints_follow_what_a_stage_reads(tmp_path):
    (tmp_path / "a.txt").write_text("some text that is long enough to be read\n" * 20)
    base = parse({"corpus": str(tmp_path)})
    later = parse({"corpus": str(tmp_path)}, ["ground.queries=7"])
    changed = [s for s in STAGES if stage_fingerprint(base, s) != stage_fingerprint(later, s)]
    assert changed == ["ground", "serve"]
    other = parse({"corpus": str(tmp_path)}, ["adapt.model=somewhere"])
    assert [s for s in STAGES if stage_fingerprint(base, s) != stage_fingerprint(other, s)] == [
        "adapt",
        "compress",
        "serve",
        "evaluate",
    ]
    reseeded = parse({"corpus": str(tmp_path)}, ["seed=1"])
    assert all(stage_fingerprint(base, s) != stage_fingerprint(reseeded, s) for s in STAGES)


def test_what_does_not_fit_is_refused_with_the_arithmetic(tmp_path):
    cost = Cost(peak_bytes=3 * 2**30, seconds=10, disk_bytes=1e6)
    plan = {
        "machine": {"memory_bytes": 2**40},
        "total": cost.as_dict(),
        "stages": {"pretrain": {"cost": cost.as_dict(), "basis": "traced", "decisions": {}}},
    }
    require_fits(parse({}), plan, tmp_path)
    with pytest.raises(BudgetError, match=r"pretrain \(traced\) needs 3.00 GiB of memory, the budget is 2\.00 GiB"):
        require_fits(parse({}, ["budget.memory=2GiB"]), plan, tmp_path)
    with pytest.raises(BudgetError, match=r"needs 10 s of time"):
        require_fits(parse({}, ["budget.time=9s"]), plan, tmp_path)
    plan["machine"]["memory_bytes"] = 2**30
    with pytest.raises(BudgetError, match=r"this machine has 1\.00 GiB"):
        require_fits(parse({}), plan, tmp_path)
    assert "pretrain" in bill_text(plan) and "3.00 GiB" in bill_text(plan)


def test_foreign_folders_are_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="no run of modicum"):
        check_folder(tmp_path)
    check_folder(tmp_path / "new")


def test_two_runs_in_one_folder_are_refused(tmp_path):
    with Run(tmp_path).lock("run"), pytest.raises(UserError, match="another process"), Run(tmp_path).lock("run"):
        pass


def _modicum(*arguments: str, **more: object) -> "subprocess.Popen[str]":
    return subprocess.Popen([sys.executable, "-m", "modicum.cli", *arguments], text=True, **more)


def test_mistakes_exit_with_two_and_leave_nothing(tmp_path):
    (tmp_path / "empty").mkdir()
    for arguments in (
        ["run", "playground-recall", "corpis=x"],
        ["run", "no.yaml"],
        ["run", "playground-recall", f"corpus={tmp_path / 'empty'}", "--out", str(tmp_path / "out")],
    ):
        done = _modicum(*arguments, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
        _, err = done.communicate()
        lines = [line for line in err.splitlines() if line.startswith("modicum: ")]
        assert done.returncode == 2 and len(lines) == 1 and "Traceback" not in err, err
    assert not (tmp_path / "out" / "plan.json").exists() and not (tmp_path / "out" / "stages").exists()


def test_a_missing_model_is_refused_before_anything_is_measured(tmp_path):
    (tmp_path / "a.txt").write_text("some text that is long enough to be read\n" * 20)
    done = _modicum(
        "run",
        "playground-recall",
        f"corpus={tmp_path / 'a.txt'}",
        f"model={tmp_path / 'none'}",
        "--out",
        str(tmp_path / "out"),
        stderr=subprocess.PIPE,
    )
    _, err = done.communicate()
    assert done.returncode == 2 and err.count("\n") == 1 and "no model at" in err, err
    assert not (tmp_path / "out").exists()


def test_a_plan_over_the_budget_leaves_nothing(tmp_path, monkeypatch):
    from modicum.pipeline import plan, run

    (tmp_path / "a.txt").write_text("some text that is long enough to be read\n" * 20)
    cost = Cost(peak_bytes=3 * 2**30, seconds=10, disk_bytes=1e6).as_dict()
    bill = {
        "machine": {"memory_bytes": 2**40},
        "total": cost,
        "stages": {"pretrain": {"cost": cost, "basis": "traced", "decisions": {}}},
    }
    monkeypatch.setattr(plan, "make_plan", lambda recipe: bill)
    recipe = parse({"corpus": str(tmp_path / "a.txt")}, ["budget.memory=2GiB"])
    with pytest.raises(BudgetError, match=r"3\.00 GiB of memory, the budget is 2\.00 GiB"):
        run.run_recipe(recipe, tmp_path / "out", notify=lambda line: None)
    assert not (tmp_path / "out").exists()


def test_a_disk_that_fills_up_ends_a_stage_in_one_line(tmp_path):
    """On a file system of 300 kB; the plan on it was made where there was room."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        corpus = pipeline_toys.corpus(tmp_path / "notes", "json", "argparse", "textwrap", "heapq", "string", "shutil")
        overrides = [f"corpus={corpus}", *SMALL, *OWN]
        (disk / "run").mkdir()
        recipe = load("quickstart", overrides)
        (disk / "run" / "run.yaml").write_text(resolved(recipe))
        (disk / "run" / "plan.json").write_text('{"stages": {}}')
        done = _modicum(
            "run",
            "quickstart",
            *overrides,
            "--out",
            str(disk / "run"),
            stderr=subprocess.PIPE,
        )
        _, err = done.communicate()
        told = [line for line in err.splitlines() if line.startswith("modicum: ")]
        assert done.returncode == 2 and len(told) == 1 and "disk is full" in told[0] and "Traceback" not in err, err
        assert not (disk / "run" / "stages" / "curate" / "done.json").exists()
    finally:
        subprocess.run(["umount", str(disk)], check=False)


def _figures(folder: Path) -> dict[str, object]:
    """Figures of every stage, without what a clock or a path says."""
    timed = {
        "seconds",
        "ttft",
        "tokens_per_second",
        "folder",
        "description",
        "steps",
        "model",
        "adapter",
        "base",
        "stats",
        "queries_per_second",
        "training_seconds",
        "index_bytes",  # its manifest says how long it took
        "milliseconds",
    }

    def plain(value: object) -> object:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items() if k not in timed}
        return [plain(v) for v in value] if isinstance(value, list) else value

    return {s: plain(json.loads((folder / "stages" / s / "done.json").read_text())["figures"]) for s in STAGES}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Overrides that name stand-ins for the two published models of the quickstart, over a small corpus."""
    folder = tmp_path_factory.mktemp("published")
    notes = pipeline_toys.corpus(folder / "notes", *MODULES)
    texts = [p.read_text() for p in notes.iterdir()]
    model, encoder = pipeline_toys.chat_model(folder / "llama", texts), pipeline_toys.encoder(folder / "bert", texts)
    return [
        f"corpus={notes}",
        f"adapt.model={model}",
        f"ground.encoder={encoder}",
        "adapt.sequence_length=512",
        "adapt.batch_tokens=1024",
        "adapt.tokens=10ktok",
        "adapt.heldout_pairs=10",
        "evaluate.questions=10",
        "fallback=null",
    ]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("which", ["own", "published"])
def test_a_kill_in_every_stage_ends_with_the_same_figures(tmp_path, published, which):
    """Two runs over a small corpus: one undisturbed, one whose every stage is killed once while it works."""
    more = published if which == "published" else [published[0], *OWN, "evaluate.questions=0"]
    command = ["run", "quickstart", *SMALL, *more]
    assert _modicum(*command, "--out", str(tmp_path / "calm")).wait() == 0
    killed: list[str] = []
    cut = tmp_path / "kill"
    (cut).mkdir()
    for name in ("plan.json", "run.yaml"):  # the same sizes: a plan depends on the machine's mood
        (cut / name).write_text((tmp_path / "calm" / name).read_text())
    for stage in STAGES:
        process = _modicum(*command, "--out", str(cut))
        while process.poll() is None:
            worker = subprocess.run(["pgrep", "-f", f"pipeline.worker {cut} {stage} "], capture_output=True, text=True)
            if worker.stdout.strip():
                _until_at_work(cut, stage, seconds=3.5)
                process.send_signal(signal.SIGKILL)
                killed.append(stage)
                break
            time.sleep(0.05)
        process.wait()
        assert process.returncode == -signal.SIGKILL, f"{stage} was not caught at work"
    assert killed == list(STAGES)
    assert _modicum(*command, "--out", str(cut)).wait() == 0
    assert _figures(cut) == _figures(tmp_path / "calm")
    assert (cut / "report.html").stat().st_size > 10_000 and not os.path.exists(cut / "stages" / "failed.json")


def _until_at_work(folder: Path, stage: str, seconds: float) -> None:
    """Wait until the stage has told of work of its own, or `seconds` have passed."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if any(
            e["kind"] not in ("stage_start", "stage_end") for e in read_events(folder / "events.jsonl", stage=stage)
        ):
            return
        time.sleep(0.05)


@pytest.mark.timeout(600)
def test_a_folder_and_a_real_model_take_the_same_road(tmp_path):
    """corpus=FOLDER model=FOLDER with a small random Qwen3 in the format its makers publish."""
    import torch
    import transformers

    from modicum.data.tokenizer import Tokenizer
    from modicum.model.folder import load_config

    corpus = pipeline_toys.corpus(tmp_path / "notes", "json", "argparse", "textwrap", "heapq", "string", "shutil")
    texts = [p.read_text() for p in corpus.iterdir()]
    (corpus / "picture.txt").write_bytes(bytes(range(256)) * 40)  # what is no text is left out, and said
    tokenizer = Tokenizer.train(texts, 600)
    shape = transformers.Qwen3Config(
        vocab_size=640,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    transformers.Qwen3ForCausalLM(shape).to(torch.bfloat16).save_pretrained(tmp_path / "qwen3")
    tokenizer.save(tmp_path / "qwen3")
    out = tmp_path / "run"
    process = _modicum(
        "run",
        "quickstart",
        f"corpus={corpus}",
        f"model={tmp_path / 'qwen3'}",
        *SMALL,
        *OWN,
        "pretrain.parameters=null",
        "pretrain.tokens=60ktok",
        "pretrain.lr=3e-3",
        "serve.engine={block_size: 8, max_length: 500}",
        "evaluate.engine={drafter: prompt-lookup}",
        "--out",
        str(out),
        "--json",
        stdout=subprocess.PIPE,
    )
    told, _ = process.communicate()
    assert process.returncode == 0
    figures = {s: json.loads((out / "stages" / s / "done.json").read_text())["figures"] for s in STAGES}
    assert "went on from" in figures["pretrain"]["description"]
    assert load_config(figures["pretrain"]["folder"]).family == "qwen3"
    after = transformers.AutoModelForCausalLM.from_pretrained(figures["adapt"]["folder"])
    assert type(after).__name__ == "Qwen3ForCausalLM"
    losses = [p["loss"] for p in figures["predict"]["proxies"]]
    assert figures["pretrain"]["heldout_loss"] < losses[0] < 6.46  # log 640: what random weights say
    assert figures["serve"]["stats"]["block_size"] == 8
    assert len(figures["serve"]["answers"]) == 3 and all(a["sources"] for a in figures["serve"]["answers"])
    assert figures["curate"]["drops"].get("binary") == 1, figures["curate"]["drops"]
    assert {"qwen3"} == {load_config(v["folder"]).family for v in figures["evaluate"]["variants"]}
    assert list(json.loads(told)) and (out / "report.html").is_file()
