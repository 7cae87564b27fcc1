"""Recipes by name: those that come with the package, beside any file."""

from __future__ import annotations

from pathlib import Path

from modicum.core.errors import UserError, unknown

HERE = Path(__file__).with_name("recipes")


def recipes() -> dict[str, Path]:
    """The packaged recipes by name, sorted."""
    return {path.stem: path for path in sorted(HERE.glob("*.yaml"))}


def summary(path: Path) -> str:
    """The first sentence of the comment that a recipe begins with."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#") or not line.strip("# "):
            break
        lines.append(line.strip("# "))
    return " ".join(lines).partition(". ")[0].rstrip(".")


def find(path_or_name: str | Path) -> Path:
    """A recipe's file. A file of that path wins over a packaged recipe of that name."""
    path = Path(path_or_name).expanduser()
    text = str(path_or_name)
    if path.is_file():
        return path
    if text in recipes():
        return recipes()[text]
    if "/" not in text and path.suffix not in (".yaml", ".yml"):
        raise unknown("recipe", text, recipes(), "Or give a file. Type: modicum ls recipes")
    near = sorted(str(p) for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
    raise UserError(
        f"no recipe at {text!r}; there: {', '.join(near) or 'none'}; by name: {', '.join(recipes())}. "
        "Type: modicum run quickstart"
    )
