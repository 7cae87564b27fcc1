"""Generation with a model folder in this process: the serving engine as a `Generate` callable."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from modicum.retrieve.ground import Generate, Generated, Messages


def local_generator(
    model: str, *, max_tokens: int = 128, temperature: float = 0.0, device: str = "cpu", dtype: str | None = None
) -> tuple[Generate, Callable[[str], int], int]:
    """(generate, token count of a text, the model's context length). The model loads here, once."""
    from modicum.data.tokenizer import Tokenizer
    from modicum.model.folder import find_folder, load_model
    from modicum.serve.config import EngineConfig
    from modicum.serve.engine import Engine
    from modicum.serve.messages import greedy_params, prompt_ids

    folder = find_folder(model)
    tokenizer = Tokenizer.load(folder)
    decoder = load_model(folder, dtype=dtype, device=device, keep_quantized=True)
    engine = Engine(decoder, tokenizer, EngineConfig(max_sequences=1))
    params = replace(greedy_params(max_tokens), temperature=temperature)

    def generate(messages: Messages, on_text: Callable[[str], None]) -> Generated:
        ids = prompt_ids(tokenizer, messages)
        chunks: list[str] = []
        count = 0
        for update in engine.stream(ids, params):
            count += len(update.tokens)
            if update.text:
                chunks.append(update.text)
                on_text(update.text)
        return Generated("".join(chunks), len(ids), count)

    def count(text: str) -> int:
        return len(tokenizer.encode(text, specials=False))

    return generate, count, int(engine.max_length)


def served_decoder(
    folder: Path, form: str | None, adapter: str | None, size: str | None, dtype: str | None, device: str
) -> Any:
    """The model as it is served: adapter attached (merged if `form` is given), weights converted to `form`."""
    from modicum.adapt.load import load_adapted
    from modicum.core.errors import UserError
    from modicum.serve.residency import is_prepared, load_prepared

    if is_prepared(folder):
        if form or adapter or size or dtype or device != "cpu":
            raise UserError(f"{folder} was written by modicum flash; leave out --form, --adapter, --size and --dtype")
        return load_prepared(folder)[1]
    return load_adapted(folder, adapter=adapter or None, form=form or None, dtype=dtype, device=device, size=size)
