"""What the pages tell a reader to type exists: verbs, options, methods, knobs, recipe keys, files."""

import importlib
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
import typer

from modicum.cli import verbs
from modicum.core import registry

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def commands(text: str) -> list[list[str]]:
    """Each `modicum ...` line of the fenced blocks, and each in the text between backticks, as words."""
    blocks = re.findall(r"```(?:sh|console|bash)?\n(.*?)```", text, re.S)
    lines = [line for block in blocks for line in block.splitlines()] + re.findall(r"`(modicum [^`\n]+)`", text)
    found = []
    for line in lines:
        line = line.strip().removeprefix("$ ").split("  #")[0].split(" | ")[0]
        if line.startswith("modicum "):
            found.append(shlex.split(line.replace("...", "").replace("[", "").replace("]", ""), comments=True)[1:])
    return found


def command_of(verb: str):
    app = typer.Typer()
    app.command(name=verb)(getattr(importlib.import_module(f"modicum.cli.{verb}"), verb))
    return typer.main.get_command(app)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_on_the_pages_exist(page):
    for words in commands(page.read_text()):
        verb, *rest = words
        for one in verb.rstrip(",").split("|"):
            if one.startswith("-") or one.isupper():
                continue
            assert one in verbs(), f"{page.name}: no verb {one!r}"
            options = {name for p in command_of(one).params for name in (*p.opts, *p.secondary_opts)} | {"--help", "-h"}
            for word in rest:
                if word.startswith("-") and not re.fullmatch(r"-?\d.*", word):
                    assert word.split("=")[0].rstrip(",") in options, f"{page.name}: {one} has no option {word}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_methods_with_knobs_on_the_pages_exist(page):
    """Where a known method is written with knobs, as in `lora:rank=8`, the knobs are its own."""
    known: dict[str, list[str]] = {}
    for port in registry.ports():
        for key in registry.methods(port):
            known.setdefault(key, []).append(port)
    for key, knob in re.findall(r"(?<![\w./-])([a-z][\w-]*):(\w+)=", page.read_text()):
        if key in known:
            names = {f.name for port in known[key] for f in fields(registry.load(port, key).config)}
            assert knob in names, f"{page.name}: {key} has no knob {knob!r}; it has {sorted(names)}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        if not re.match(r"[a-z]+:", target):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}, which is not there"


def test_recipe_overrides_on_the_pages_are_valid():
    from modicum.pipeline.recipe import load

    for page in PAGES:
        for words in commands(page.read_text()):
            if words[0] in ("run", "plan") and len(words) > 1 and not words[1].startswith("-"):
                place = ROOT / words[1] if words[1].startswith("recipes/") else words[1]
                load(place, [w for w in words[2:] if "=" in w and not w.startswith("-")])
