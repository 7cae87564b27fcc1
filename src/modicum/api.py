"""The Python interface: one class, `Model`, for what the verbs chat, serve and adapt do.

    from modicum import Model

    model = Model("smollm2")                                  # a known name, a folder, or a hub id
    print(model.chat("What is the capital of France?"))
    for text in model.stream("Tell me a story."):
        print(text, end="", flush=True)
    texts = model.generate(["The sea is", "The sky is"], max_tokens=16, temperature=0)

    better = model.adapt("pairs.jsonl", "runs/pairs", epochs=3)   # LoRA on questions and answers
    better.save("my-model")                                       # a folder that transformers loads, too
    better.serve(port=8000)                                       # OpenAI-compatible, until Ctrl-C

What is below it is public as well: `model.decoder` is a `torch.nn.Module`, `model.tokenizer` a
`data.tokenizer.Tokenizer`, `model.engine` the batching `serve.engine.Engine`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from modicum.core.errors import UserError, unknown

if TYPE_CHECKING:
    from modicum.data.tokenizer import Tokenizer
    from modicum.model.decoder import Decoder
    from modicum.serve.engine import Engine
    from modicum.serve.request import SamplingParams
    from modicum.serve.server import BackgroundServer

Message = Mapping[str, str]


class Model:
    """A language model with its tokenizer, ready to generate.

    model: a known name (`modicum ls models`), a model folder, a .gguf file or a hub id OWNER/NAME; fetched if need be.
    dtype: "float32", "bfloat16" or "float16"; None as stored. device: "cpu" or "cuda". adapter: a LoRA folder in
    PEFT's format. form: hold the layers' matrices in this linear form, for example "int8" or "int4" (an adapter is
    merged first); without form and adapter, a GGUF file's matrices keep their codes on a CPU. size: of a model in
    blocks, load so much ("24MiB"). Other keywords are `EngineConfig`'s: cache="1GiB", kv="snapkv", ...

    Raises `UserError` (one line) for what cannot be used as given, `CorruptError` for damaged files. Not safe to use
    from several threads at once; for that there is `server`.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        dtype: str | None = None,
        device: str = "cpu",
        adapter: str | Path | None = None,
        form: Any = None,
        size: float | str | None = None,
        **engine: Any,
    ):
        from modicum.adapt.load import load_adapted
        from modicum.data.tokenizer import Tokenizer
        from modicum.model.folder import find_folder
        from modicum.serve.config import EngineConfig

        self._config = EngineConfig(**_known("engine setting", EngineConfig, engine))
        self._load = {"dtype": dtype, "device": device, "size": size} | engine
        self.folder = find_folder(model)
        self.tokenizer: Tokenizer = Tokenizer.load(self.folder)
        self.name = Path(model).expanduser().resolve().name.removesuffix(".gguf")  # in the API of a server
        self._as_stored = adapter is None and form is None
        self.decoder: Decoder = load_adapted(
            self.folder, adapter=adapter, form=form, dtype=dtype, device=device, size=size
        )
        self.adapter = None if adapter is None else Path(adapter)
        self.form = form
        self._engine: Engine | None = None

    def __repr__(self) -> str:
        extra = "".join(f", {n}={str(v)!r}" for n, v in (("adapter", self.adapter), ("form", self.form)) if v)
        return f"Model({str(self.folder)!r}{extra})"

    @property
    def engine(self) -> Engine:
        """The engine, made when first needed: many prompts at once, log probabilities, several samples each."""
        if self._engine is None:
            from modicum.serve.engine import Engine

            self._engine = Engine(self.decoder, self.tokenizer, self._config)
        return self._engine

    def chat(self, messages: str | Sequence[Message], *, system: str | None = None, **sampling: Any) -> str:
        """The answer to a message, or to a conversation [{"role": "user", "content": ...}, ...].

        sampling: fields of `SamplingParams` (max_tokens, temperature, top_p, top_k, seed, stop, ...); those left out
        are as the model's publisher advises, where it does. The oldest turns are left out once the conversation is
        longer than the model's context.
        """
        return "".join(self.stream(messages, system=system, **sampling))

    def stream(self, messages: str | Sequence[Message], *, system: str | None = None, **sampling: Any) -> Iterator[str]:
        """The same as `chat`, as it is generated; leaving the loop early ends the request."""
        from modicum.model.sampling import advised
        from modicum.serve.chat import CHAT, local

        turns: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
        turns += [{"role": "user", "content": messages}] if isinstance(messages, str) else [dict(m) for m in messages]
        if not turns or any(m.keys() < {"role", "content"} for m in turns):
            raise UserError("messages must be a text, or a list of {'role': ..., 'content': ...} with one at least")
        return local(self.engine, _sampling(CHAT | advised(self.folder) | sampling))(turns)

    @overload
    def generate(self, prompts: str, **sampling: Any) -> str: ...
    @overload
    def generate(self, prompts: Sequence[str], **sampling: Any) -> list[str]: ...
    def generate(self, prompts: str | Sequence[str], **sampling: Any) -> str | list[str]:
        """The continuation of a text, or of each of several (computed together), without a chat template.

        For tokens, log probabilities or several samples of each: `model.engine.generate(prompts, SamplingParams(...))`.
        """
        params = _sampling(sampling)
        if params.n != 1:
            raise UserError(
                f"n={params.n} gives several samples; use model.engine.generate(prompts, SamplingParams(n=...))"
            )
        texts = [o.text for o in self.engine.generate([prompts] if isinstance(prompts, str) else prompts, params)]
        return texts[0] if isinstance(prompts, str) else texts

    def adapt(self, pairs: Any, folder: str | Path, **knobs: Any) -> Model:
        """Train a small adapter on questions and answers and return the adapted model; this one stays as it is.

        pairs: a JSONL file, a curated folder, or an iterable of objects with id, question and answer. folder:
        for the adapter in PEFT's format, checkpoints (a stopped run goes on from them) and adapt.json with the losses.
        knobs: settings of `AdaptSpec` (form, targets, base, epochs, tokens, lr, ...).
        """
        from modicum.adapt.run import adapt
        from modicum.adapt.spec import AdaptSpec

        if self.adapter is not None or self.form is not None:
            raise UserError(
                f"{self!r} holds an adapter or a form; save it and adapt the saved folder, or adapt the model without "
                "them (base='int4' trains over 4-bit weights)"
            )
        result = adapt(self.folder, pairs, AdaptSpec(**knobs), folder)
        if result.model is not None:
            return Model(result.model, **self._load)
        return Model(self.folder, adapter=result.adapter, **self._load)

    def save(self, folder: str | Path) -> Path:
        """Write a Hugging Face folder, whole or not at all: an adapter is merged in, a form is kept as it is.

        With a form the folder is whole for modicum only; without one, for every program that reads such folders (a
        GGUF file's codes become plain matrices there).
        """
        from modicum.model.attach import forms, merge
        from modicum.model.folder import load_model, save_model

        if self.adapter is not None and self.form is None:
            merge(self.decoder)
            self.adapter, self._engine = None, None  # an engine may have packed the weights as they were
        decoder = self.decoder
        if self._as_stored and (self.folder / "model.gguf").exists() and forms(decoder):
            decoder = load_model(self.folder, dtype=self._load["dtype"])
        save_model(decoder, folder, tokenizer_folder=self.folder)
        return Path(folder)

    def serve(self, host: str = "127.0.0.1", port: int = 8000, **settings: Any) -> None:
        """Serve over an OpenAI-compatible API until Ctrl-C; settings are `ServerConfig`'s (api_key, max_queue, ...)."""
        from modicum.serve.server import Server

        server = Server(self.engine, self._server_config(host, port, settings))
        print(f"{server.settings.model} at {server.url}/v1; Ctrl-C stops it", flush=True)
        server.serve_until_stopped()

    def server(self, host: str = "127.0.0.1", port: int = 0, **settings: Any) -> BackgroundServer:
        """A server in a thread of this program, as a context manager; port 0 takes a free one.

            with model.server() as server:
                client = openai.OpenAI(base_url=server.url + "/v1", api_key="none")

        Until it ends, the model is the server's: ask through it.
        """
        from modicum.serve.server import BackgroundServer

        return BackgroundServer(self.engine, self._server_config(host, port, settings))

    def _server_config(self, host: str, port: int, settings: dict[str, Any]) -> Any:
        from modicum.model.sampling import advised
        from modicum.serve.api import ServerConfig

        named = {"model": self.name, "sampling": advised(self.folder)} | settings
        return ServerConfig(host=host, port=port, **_known("server setting", ServerConfig, named))


def _known(kind: str, config: type, given: dict[str, Any]) -> dict[str, Any]:
    """`given`, if all of it are fields of the dataclass `config`."""
    allowed = [f.name for f in dataclasses.fields(config)]
    for name in given:
        if name not in allowed:
            raise unknown(kind, name, allowed)
    return given


def _sampling(given: dict[str, Any]) -> SamplingParams:
    from modicum.serve.request import SamplingParams

    return SamplingParams(**_known("sampling parameter", SamplingParams, given))
