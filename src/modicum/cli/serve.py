"""Serve a model over an OpenAI-compatible API, with a chat page if asked for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from modicum.serve.engine import Engine
    from modicum.serve.server import Server


def _option(panel: str) -> Any:
    """Options of one panel of the help text."""

    def option(*names: str, help: str, **more: Any) -> Any:
        return typer.Option(*names, help=help, rich_help_panel=panel, **more)

    return option


_http, _page = _option("HTTP server"), _option("Chat page and search")
_weights, _cache = _option("Model"), _option("Cache and batching")
_speculative, _hardware = _option("Speculative decoding"), _option("Hardware")

Model = Annotated[str, typer.Argument(help="A model folder, a known name (modicum ls models), or a hub id OWNER/NAME.")]

Host = Annotated[str, _http(help="Address to listen on; 0.0.0.0 accepts other machines.")]
Port = Annotated[int, _http(help="Port; 0 chooses a free one.")]
Name = Annotated[str | None, _http(help="Model name in the API; default: the folder's name.")]
ApiKey = Annotated[str | None, _http(help="Require this API key.", envvar="MODICUM_API_KEY", show_envvar=True)]
MaxQueue = Annotated[int, _http(help="Requests that may wait; more are answered 429.")]
Drain = Annotated[float, _http(help="Seconds that running requests get after Ctrl-C.")]

Ui = Annotated[bool, _page("--ui", help="Serve a chat page at /.")]
IndexFolder = Annotated[
    str | None, _page("--index", help="A folder made by `modicum index`: chats can cite its passages.")
]
EncoderName = Annotated[
    str | None, _page("--encoder", help="Serve /v1/embeddings by this encoder: a folder or a known name, e.g. minilm.")
]
Passages = Annotated[int, _page(help="Passages retrieved for a question, unless the request says how many.")]

Form = Annotated[str | None, _weights(help="Quantize the layers' weights to this form, e.g. int8 or int4.")]
Adapter = Annotated[str | None, _weights(help="A LoRA adapter folder in PEFT format.")]
Adapters = Annotated[
    list[str] | None,
    _weights("--adapters", help="NAME=FOLDER, repeatable: adapters served beside the model, chosen by their names."),
]
RuntimeAdapters = Annotated[
    bool, _weights("--runtime-adapters", help="Let clients load and unload adapters: /v1/load_lora_adapter.")
]
Size = Annotated[str | None, _weights(help="Weight-memory limit for a BitStack model, e.g. 24MiB.")]
Dtype = Annotated[str | None, _weights(help="float32, bfloat16 or float16; default: as stored.")]

Cache = Annotated[str, _cache(help="KV-cache memory: auto, 1GiB, 50ktok.")]
MaxSequences = Annotated[int, _cache(help="Maximum sequences per step.")]
MaxBatchTokens = Annotated[int, _cache(help="Maximum tokens per step.")]
MaxLength = Annotated[int | None, _cache(help="Maximum length of prompt and answer together; default: the model's.")]
BlockSize = Annotated[int, _cache(help="Tokens per cache block.")]
PrefixCache = Annotated[bool, _cache(help="Reuse the cached keys and values of equal prompt prefixes.")]
ChunkedPrefill = Annotated[
    bool | None, _cache(help="Split prefill into chunks between decode steps; default: as the scheduler does.")
]
Scheduler = Annotated[str, _cache(help="KEY or KEY:knob=value; see modicum ls scheduler.")]
Kv = Annotated[str, _cache(help="KV-cache policy, KEY or KEY:knob=value; see modicum ls kv.")]
Guide = Annotated[
    str, _cache(help="Models whose logits are combined with this one's, e.g. eft:tuned=A,base=B; see modicum ls guide.")
]
CacheForm = Annotated[str, _cache(help="How the KV cache is stored, e.g. int8; see modicum ls cacheform.")]
GenerationConfig = Annotated[
    bool,
    _http(help="Sampling settings that a request leaves out: as the model's publisher advises, else as OpenAI."),
]

Drafter = Annotated[str, _speculative(help="Drafting method, KEY or KEY:knob=value; see modicum ls drafter.")]
DraftTokens = Annotated[int, _speculative(help="Maximum draft tokens per step, over all sequences.")]
DraftWhen = Annotated[str, _speculative(help="pays: only while it speeds up decoding; always: in every step.")]

Device = Annotated[str, _hardware(help="cpu or cuda.")]
CudaGraphs = Annotated[bool, _hardware(help="On a GPU, replay decode steps as CUDA graphs.")]
ActivationBits = Annotated[
    int,
    _hardware(help="Activation precision of the CPU kernels: 16, or 8 (W8A8, W4A8: faster prefill, less accurate)."),
]
FastPrefill = Annotated[
    bool,
    _hardware(
        help="Long steps through PyTorch's matrix library where it is measured to be faster than the kernels "
        "(last bits then depend on the batch)."
    ),
]


def serve(
    model: Model,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    name: Name = None,
    api_key: ApiKey = None,
    max_queue: MaxQueue = 256,
    drain: Drain = 10.0,
    ui: Ui = False,
    index: IndexFolder = None,
    passages: Passages = 3,
    encoder: EncoderName = None,
    form: Form = None,
    adapter: Adapter = None,
    adapters: Adapters = None,
    runtime_adapters: RuntimeAdapters = False,
    size: Size = None,
    dtype: Dtype = None,
    cache: Cache = "auto",
    max_sequences: MaxSequences = 64,
    max_batch_tokens: MaxBatchTokens = 2048,
    max_length: MaxLength = None,
    block_size: BlockSize = 16,
    prefix_cache: PrefixCache = True,
    chunked_prefill: ChunkedPrefill = None,
    scheduler: Scheduler = "fcfs",
    kv: Kv = "full",
    cache_form: CacheForm = "plain",
    drafter: Drafter = "none",
    guide: Guide = "none",
    draft_tokens: DraftTokens = 96,
    draft_when: DraftWhen = "pays",
    device: Device = "cpu",
    cuda_graphs: CudaGraphs = True,
    activation_bits: ActivationBits = 16,
    fast_prefill: FastPrefill = False,
    generation_config: GenerationConfig = True,
) -> None:
    """Serve a model over an OpenAI-compatible API, with a chat page if asked for (--ui)."""
    from modicum.adapt.peft_format import load_peft
    from modicum.cli._embedding import EncoderEmbedder
    from modicum.cli._grounding import IndexGrounding
    from modicum.cli._local import served_decoder
    from modicum.core.errors import UserError
    from modicum.data.tokenizer import Tokenizer
    from modicum.model.folder import find_folder
    from modicum.model.sampling import advised
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
        cache_form=cache_form,
        drafter=drafter,
        guide=guide,
        draft_tokens=draft_tokens,
        draft_when=draft_when,
        cuda_graphs=cuda_graphs,
        activation_bits=activation_bits,
        fast_prefill=fast_prefill,
    )
    if drain < 0 or max_queue < 1:
        raise UserError(f"--drain {drain} must not be negative and --max-queue {max_queue} must be at least 1")
    grounding = IndexGrounding(index, passages, device=device) if index else None
    embedder = EncoderEmbedder(encoder, device=device) if encoder else None
    folder = find_folder(model)
    tokenizer = Tokenizer.load(folder)
    engine = Engine(served_decoder(folder, form, adapter, size, dtype, device), tokenizer, config)
    for entry in adapters or ():
        adapter_name, _, adapter_folder = entry.partition("=")
        if not adapter_name or not adapter_folder:
            raise UserError(f"--adapters {entry} is not NAME=FOLDER, such as --adapters support=runs/support/adapter")
        engine.add_adapter(adapter_name, adapter_folder, load_peft)
    if grounding:
        grounding.use(tokenizer, engine.max_length)
    server = Server(
        engine,
        ServerConfig(
            model=name or Path(model).resolve().name,
            adapter=Path(adapter).resolve().name if adapter else None,
            ui=ui,
            runtime_adapters=runtime_adapters,
            host=host,
            port=port,
            api_key=api_key,
            max_queue=max_queue,
            drain=drain,
            sampling=advised(folder) if generation_config else {},
        ),
        grounding,
        embedder,
        load_peft,
    )
    _print_address(server, engine)
    if grounding:
        grounding.open_in_background()
    server.serve_until_stopped()
    print(f"stopped after {engine.stats()['generated_tokens']} generated tokens")


def _print_address(server: Server, engine: Engine) -> None:
    """Print the model, the cache and the address."""
    from modicum.budget.units import bytes_text
    from modicum.serve.guard import LOOPBACK

    settings, stats, grounding = server.settings, engine.stats(), server.api.grounding
    key = ' -H "Authorization: Bearer $MODICUM_API_KEY"' if settings.api_key else ""
    print(
        f"{settings.model} at {server.url}/v1: {engine.max_length} tokens of context, cache of {stats['blocks']} "
        f"blocks ({stats['blocks'] * stats['block_size']} tokens, {bytes_text(stats['cache_bytes'])}), "
        f"runner: {stats['runner']}"
    )
    if grounding:
        print("index {index}: {passages} passages, {k} for each question".format(**grounding.card()))
    if settings.ui:
        print(f"chat page: {server.url}/")
    if settings.host not in LOOPBACK and not settings.api_key:
        print("anybody who can connect to this machine can use it: add --api-key, or leave out --host")
    print(
        f"""
  curl {server.url}/v1/chat/completions{key} -H 'Content-Type: application/json' \\
    -d '{{"model": "{settings.model}", "messages": [{{"role": "user", "content": "Hello!"}}], "max_tokens": 64}}'

Ctrl-C stops it; running requests get {settings.drain:g} s.""",
        flush=True,
    )
