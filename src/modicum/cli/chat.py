"""Talk to a model in the terminal."""

from __future__ import annotations

import sys
from typing import Annotated

import typer


def chat(
    model: Annotated[str, typer.Argument(help="A model folder, a known name (modicum ls models), a hub id, or a URL.")],
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    message: Annotated[
        str | None, typer.Option("-m", "--message", help="Send one message, print the answer, exit.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Maximum tokens of an answer.")] = 512,
    temperature: Annotated[
        float | None,
        typer.Option(help="Sampling temperature; 0 is greedy. Default: what the model's publisher advises, else 0.7."),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="Nucleus sampling: the likeliest tokens of this total probability. Default: likewise, 0.95."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answers.")] = None,
    name: Annotated[
        str | None, typer.Option(help="With a URL: the model's name on the server; default: the first.")
    ] = None,
    api_key: Annotated[str | None, typer.Option(envvar="MODICUM_API_KEY", help="With a URL: the API key.")] = None,
    cache: Annotated[str, typer.Option(help="KV-cache memory: auto, 1GiB, 50ktok.")] = "auto",
    cache_form: Annotated[
        str, typer.Option(help="How keys and values are stored, e.g. int8; see modicum ls cacheform.")
    ] = "plain",
    size: Annotated[
        str | None,
        typer.Option(help="Weight-memory limit for a BitStack model, e.g. 24MiB."),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: as stored.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Talk to a model in the terminal. /reset clears the conversation, /exit (or Ctrl-D) ends it."""
    from modicum.core.errors import UserError
    from modicum.serve.chat import CHAT, Conversation, local, remote
    from modicum.serve.request import SamplingParams

    given = {n: v for n, v in (("temperature", temperature), ("top_p", top_p), ("seed", seed)) if v is not None}
    if model.startswith(("http://", "https://")):
        talk = Conversation(remote(model, name, {"max_tokens": max_tokens} | given, api_key), system)
    else:
        from modicum.model.folder import find_folder
        from modicum.model.sampling import advised
        from modicum.serve.config import EngineConfig
        from modicum.serve.load import load_engine

        folder = find_folder(model)
        params = SamplingParams(**(CHAT | advised(folder) | given | {"max_tokens": max_tokens}))
        engine = load_engine(
            folder,
            EngineConfig(cache=cache, cache_form=cache_form, max_sequences=1),
            dtype=dtype,
            device=device,
            size=size,
        )
        talk = Conversation(local(engine, params), system)

    def answer(text: str) -> None:
        chunks = talk.ask(text)
        try:
            for chunk in chunks:
                sys.stdout.write(chunk)
                sys.stdout.flush()
        except KeyboardInterrupt:
            chunks.close()  # type: ignore[attr-defined]   # keeps the text generated so far
            sys.stdout.write(" ...")
        print()

    if message is not None:
        answer(message)
        return
    asking = sys.stdin.isatty()
    if asking:
        print("/reset clears the conversation, /exit ends it, Ctrl-C stops an answer", file=sys.stderr)
    while True:
        try:
            text = input("> " if asking else "").strip()
        except EOFError:
            break
        if text in ("/exit", "/quit"):
            break
        if text == "/reset":
            talk.reset()
        elif text:
            try:
                answer(text)
            except UserError as error:
                if not asking:
                    raise
                print(f"modicum: {error}", file=sys.stderr)  # a message too long: the conversation goes on
