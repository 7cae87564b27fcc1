"""Serve a model over an OpenAI-compatible API."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def serve(
    model: Annotated[
        str, typer.Argument(help="A model folder, a known name (modicum ls models), or a hub id OWNER/NAME.")
    ],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.")] = 8000,
    name: Annotated[str | None, typer.Option(help="Model name in the API; the folder's name if left out.")] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="MODICUM_API_KEY", help="Ask clients for this key.", show_envvar=True)
    ] = None,
    form: Annotated[str | None, typer.Option(help="Hold the layers' weights in this form, e.g. int8 or int4.")] = None,
    adapter: Annotated[str | None, typer.Option(help="A LoRA adapter folder in PEFT format.")] = None,
    cache: Annotated[str, typer.Option(help="Memory for keys and values: auto, 1GiB, 50ktok.")] = "auto",
    max_sequences: Annotated[int, typer.Option(help="Sequences computed at once.")] = 64,
    max_batch_tokens: Annotated[int, typer.Option(help="Tokens of one step.")] = 2048,
    max_length: Annotated[int | None, typer.Option(help="Prompt and answer together; default: the model's.")] = None,
    block_size: Annotated[int, typer.Option(help="Tokens per cache block.")] = 16,
    prefix_cache: Annotated[bool, typer.Option(help="Reuse what equal beginnings have computed.")] = True,
    chunked_prefill: Annotated[
        bool | None,
        typer.Option(help="Compute prompts in pieces between decodes; default: as the scheduler's knobs say."),
    ] = None,
    scheduler: Annotated[str, typer.Option(help="KEY or KEY:knob=value; see modicum ls scheduler.")] = "fcfs",
    kv: Annotated[str, typer.Option(help="KEY or KEY:knob=value; see modicum ls kv.")] = "full",
    drafter: Annotated[
        str, typer.Option(help="Guess tokens ahead; KEY or KEY:knob=value, see modicum ls drafter.")
    ] = "none",
    draft_tokens: Annotated[int, typer.Option(help="Guessed tokens of one step, shared by its sequences.")] = 96,
    draft_when: Annotated[str, typer.Option(help="pays (judged by the clock) or always.")] = "pays",
    cuda_graphs: Annotated[
        bool, typer.Option(help="On a GPU, replay decode steps instead of launching every kernel anew.")
    ] = True,
    activation_bits: Annotated[
        int, typer.Option(help="16, or 8: quicker prompts and batches on int8 or int4 matrices, rounded more.")
    ] = 16,
    size: Annotated[
        str | None,
        typer.Option(help="Of a model in blocks (compress --form bitstack): load so much, e.g. 24MiB."),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: as stored.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    max_queue: Annotated[int, typer.Option(help="Requests that may wait; more are answered 429.")] = 256,
    drain: Annotated[float, typer.Option(help="Seconds that running requests get after Ctrl-C.")] = 10.0,
) -> None:
    """Serve a model over an OpenAI-compatible API: /v1/completions, /v1/chat/completions, /v1/models."""
    from modicum.budget.units import bytes_text
    from modicum.core.errors import UserError
    from modicum.data.tokenizer import Tokenizer
    from modicum.model.folder import find_folder, load_model
    from modicum.serve.config import EngineConfig
    from modicum.serve.engine import Engine
    from modicum.serve.server import Server, ServerConfig

    config = EngineConfig(
        block_size=block_size,
        cache=cache,
        max_batch_tokens=max_batch_tokens,
        max_sequences=max_sequences,
        max_length=max_length,
        prefix_cache=prefix_cache,
        chunked_prefill=chunked_prefill,
        scheduler=scheduler,
        kv=kv,
        drafter=drafter,
        draft_tokens=draft_tokens,
        draft_when=draft_when,
        cuda_graphs=cuda_graphs,
        activation_bits=activation_bits,
    )
    if drain < 0 or max_queue < 1:
        raise UserError(f"--drain {drain} must not be negative and --max-queue {max_queue} must be at least 1")
    folder = find_folder(model)
    tokenizer = Tokenizer.load(folder)
    decoder = load_model(folder, dtype=dtype, device=device, size=size)
    if adapter:
        from modicum.adapt.peft_format import load_peft

        load_peft(decoder, adapter)
    if form:
        from modicum.model.attach import attach, merge, require_fit

        require_fit(form)
        if adapter:
            merge(decoder)
        attach(decoder, {"layers.*": form})
    engine = Engine(decoder, tokenizer, config)
    name = name or Path(model).resolve().name
    server = Server(
        engine,
        ServerConfig(model=name, host=host, port=port, api_key=api_key, max_queue=max_queue, drain=drain),
    )
    stats = engine.stats()
    key = ' -H "Authorization: Bearer $MODICUM_API_KEY"' if api_key else ""
    print(
        f"{name} at {server.url}/v1: {engine.max_length} tokens of context, cache of {stats['blocks']} "
        f"blocks ({stats['blocks'] * stats['block_size']} tokens, {bytes_text(stats['cache_bytes'])}), "
        f"runner: {stats['runner']}"
    )
    if host not in ("127.0.0.1", "localhost", "::1") and not api_key:
        print("anybody who reaches this machine can use it: add --api-key, or leave --host out")
    print(
        f"""
  curl {server.url}/v1/chat/completions{key} -H 'Content-Type: application/json' \\
    -d '{{"model": "{name}", "messages": [{{"role": "user", "content": "Hello!"}}], "max_tokens": 64}}'

Ctrl-C stops it; running requests get {drain:g} s.""",
        flush=True,
    )
    server.serve_until_stopped()
    print(f"stopped after {engine.stats()['generated_tokens']} generated tokens")
