"""Ask a question and get an answer with numbered sources from an index."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer


def ask(
    index: Annotated[str, typer.Argument(help="A folder made by `modicum index`.")],
    question: Annotated[str, typer.Argument(help="What you want to know.")],
    model: Annotated[
        str | None,
        typer.Option(help="A model folder to answer with; with --url, the name of a model that the server has."),
    ] = None,
    url: Annotated[str | None, typer.Option(help="An OpenAI-compatible server: http://127.0.0.1:8000/v1.")] = None,
    k: Annotated[int, typer.Option("-k", help="Passages to ground on; more for a larger model.")] = 1,
    mode: Annotated[str | None, typer.Option(help="bm25, dense or fused (if there is an encoder).")] = None,
    prompt_tokens: Annotated[
        int | None, typer.Option(help="Maximum prompt tokens, sources included; default: 40 + 160 per passage.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Maximum tokens of the answer.")] = 128,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy.")] = 0.0,
    encoder: Annotated[str | None, typer.Option(help="New path of the encoder's model, if it moved.")] = None,
    device: Annotated[str, typer.Option(help="Where models run: cpu or cuda.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Ask a question and get an answer with numbered sources from an index."""
    from modicum.core.errors import UserError
    from modicum.retrieve import ground
    from modicum.retrieve.live import open_searcher

    if not url and not model:
        raise UserError("no model to write the answer; add --model FOLDER, or --url http://HOST:PORT/v1")
    searcher = open_searcher(index, device=device, model=encoder)
    count = None
    if url:
        generate = ground.openai_generator(url, model=model, max_tokens=max_tokens, temperature=temperature)
    else:
        from modicum.cli._local import local_generator

        generate, count, context = local_generator(
            str(model), max_tokens=max_tokens, temperature=temperature, device=device
        )
        prompt_limit = context - max_tokens
        if prompt_tokens is not None and prompt_tokens > prompt_limit:
            raise UserError(
                f"--prompt-tokens {prompt_tokens} and --max-tokens {max_tokens} exceed the model's context "
                f"of {context}; their sum must stay within it"
            )
        prompt_tokens = prompt_tokens or min(ground.prompt_budget_for(k), prompt_limit)

    def show(chunk: str) -> None:
        if not as_json:
            sys.stdout.write(chunk)
            sys.stdout.flush()

    answer = ground.ask(
        question, searcher, generate, k=k, mode=mode, prompt_budget=prompt_tokens, count=count, on_text=show
    )
    if as_json:
        print(json.dumps(answer.as_dict(), indent=2, ensure_ascii=False))
        return
    print("\n\nSources (* cited):")
    for source in answer.sources:
        print(f" {'*' if source.cited else ' '}[{source.number}] {source.title or source.id}  ({source.source})")
    if answer.attributed:
        print("The model cited nothing; citations were added where a source contains the answer's words.")
    elif not answer.citations and answer.sources:
        print("The answer cites nothing, and no source contains its words: verify it.")
    if answer.unknown_citations:
        print(f"The answer also cites {answer.unknown_citations}, which are not sources: verify those statements.")
    print(f"{answer.prompt_tokens} prompt tokens, {answer.seconds:.1f} s")
