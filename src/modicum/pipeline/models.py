"""The models that a recipe names beside the one it trains, and what holds where they cannot be had.

`adapt.model` and `ground.encoder` are folders, hub ids, or names that `modicum get` knows; the latter two are
fetched when they are first needed. A recipe's `fallback` is a set of overrides, `key.path: value`, for a machine
that can neither find nor fetch them; without one, a model that cannot be had is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from modicum.core.errors import ModicumError, UserError
from modicum.pipeline.recipe import Recipe, overridden


def named(recipe: Recipe) -> dict[str, str]:
    """{recipe key: model} for the models that must be there before the run."""
    return {
        f"{entry.name}.{key}": model
        for entry in recipe.entries
        for key, model in entry.stage.models(entry.section).items()
    }


def folder_of(model: str) -> Path:
    """The model's folder, fetched if it is not on this machine. Raises `UserError` where it cannot be had."""
    from modicum.model.folder import find_folder

    return find_folder(model)


def with_models(recipe: Recipe, notify: Callable[[str], None]) -> Recipe:
    """The recipe as it can be run here: its models are present, or its fallback is applied and said in one line."""
    for key, model in named(recipe).items():
        try:
            folder_of(model)
        except ModicumError as error:
            if not recipe.fallback:
                raise UserError(f"{key}={model}: {error}") from None
            notify(f"{key}={model} cannot be had here ({error}); going on with the recipe's fallback: {_text(recipe)}")
            return overridden(recipe, recipe.fallback)
    return recipe


def _text(recipe: Recipe) -> str:
    return " ".join(f"{key}={'null' if value is None else value}" for key, value in (recipe.fallback or {}).items())
