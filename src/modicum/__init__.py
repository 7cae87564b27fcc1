"""modicum: language models on a modest budget.

    from modicum import Model

    print(Model("smollm2").chat("What is the capital of France?"))

The names below are imported when they are first used: `import modicum` imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modicum.api import Model as Model
    from modicum.core.errors import ModicumError as ModicumError
    from modicum.core.errors import UserError as UserError
    from modicum.data.tokenizer import Tokenizer as Tokenizer
    from modicum.model.folder import load_model as load_model
    from modicum.model.folder import save_model as save_model
    from modicum.serve.config import EngineConfig as EngineConfig
    from modicum.serve.engine import Engine as Engine
    from modicum.serve.request import SamplingParams as SamplingParams

__version__ = "0.1.0"

_WHERE = {
    "Model": "api",
    "Engine": "serve.engine",
    "EngineConfig": "serve.config",
    "SamplingParams": "serve.request",
    "Tokenizer": "data.tokenizer",
    "load_model": "model.folder",
    "save_model": "model.folder",
    "ModicumError": "core.errors",
    "UserError": "core.errors",
}
__all__ = [*_WHERE]  # noqa: PLE0604 - names, as text


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'modicum' has no attribute {name!r}")
    return getattr(importlib.import_module(f"modicum.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
