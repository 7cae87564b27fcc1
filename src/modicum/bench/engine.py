"""engine: how fast the serving engine is beside other engines, on the same weights in the same run.

    modicum bench engine [--quick] [--json]

One random Llama-like model in bfloat16, written to a folder, is generated from by modicum, by
`transformers.generate`, and by llama-cpp-python and openvino-genai where they are installed. A measurement is a
column (`decode bf16`, `prefill int8`, ...) of one engine; rounds visit all of them in turn, so that a slow minute of
the machine falls on everybody, and a column's figure is the median over rounds with its spread. The same run measures
the machine's own ceilings: reading memory, and bfloat16 products. Ratios are to `transformers` in bfloat16.
"""

from __future__ import annotations

import datetime
import functools
import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from modicum.bench import record
from modicum.core.files import fingerprint
from modicum.model.config import DecoderConfig, llama_like
from modicum.model.decoder import Decoder

FORMS: dict[str, dict[str, str]] = {
    "bf16": {},
    "int8": {"layers.*": "int8", "lm_head": "int8"},
    "int4": {"layers.*": "int4", "lm_head": "int8"},
}
BASE = "transformers"


@dataclass(frozen=True, kw_only=True)
class Size:
    """What is measured. prompt: before decoding; tokens: decoded; prefill: prompt of the prefill column; answer: tokens
    of each of `requests` at once (and of one alone), their prompts' time included."""

    layers: int = 24
    width: int = 1024
    heads: int = 16
    kv_heads: int = 4
    mlp_width: int = 2816
    vocab: int = 32000
    prompt: int = 32
    tokens: int = 48
    prefill: int = 512
    requests: int = 16
    answer: int = 128
    rounds: int = 3


QUICK = Size(
    layers=4, width=256, heads=4, kv_heads=2, mlp_width=704, vocab=4000, tokens=16, prefill=128, answer=16, rounds=2
)


@dataclass
class Row:
    """One column of one engine: rates in tokens per second, one per round."""

    engine: str
    column: str
    rates: list[float] = field(default_factory=list)
    bytes: int = 0

    @property
    def median(self) -> float:
        return statistics.median(self.rates)

    @property
    def spread(self) -> float:
        """Largest minus smallest, over the median."""
        return (max(self.rates) - min(self.rates)) / self.median

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"tokens_per_s": self.median, "spread": self.spread}


def shape_of(size: Size) -> DecoderConfig:
    return llama_like(
        size.vocab, size.width, size.layers, size.heads, size.kv_heads, size.mlp_width, context_length=2048, tied=True
    )


def make_folder(size: Size, path: Path, seed: int) -> None:
    """Random weights of the usual spread, in bfloat16, as a model folder."""
    from modicum.model.folder import save_model

    save_model(Decoder(shape_of(size), torch.Generator().manual_seed(seed)).to(torch.bfloat16), path)


# what is timed: each of these returns {column: () -> tokens per second} ------------------------------


def modicum(folder: Path, size: Size, form: str) -> dict[str, Callable[[], float]]:
    from modicum.model.attach import attach
    from modicum.model.folder import load_model
    from modicum.serve.config import EngineConfig
    from modicum.serve.engine import Engine
    from modicum.serve.request import SamplingParams

    model = load_model(folder)
    if FORMS[form]:
        attach(model, FORMS[form])
    cache = f"{size.prefill + (size.prompt + size.answer + 16) * size.requests}tok"
    engine = Engine(model, None, EngineConfig(cache=cache, prefix_cache=False))

    def run(prompts: list[list[int]], tokens: int) -> list[Any]:
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        return [o.completions[0] for o in engine.generate(prompts, params)]

    def decode() -> float:
        (done,) = run([list(range(1, size.prompt + 1))], size.tokens + 1)
        return size.tokens / (done.seconds - done.first_token_seconds)

    def prefill() -> float:
        return size.prefill / _seconds(lambda: run([list(range(1, size.prefill + 1))], 1))

    def together(prompts: list[list[int]]) -> float:
        return len(prompts) * size.answer / _seconds(lambda: run(prompts, size.answer))

    many = [[i + 1] * size.prompt for i in range(size.requests)]
    found: dict[str, Callable[[], float]] = {f"decode {form}": decode, f"prefill {form}": prefill}
    if form == "bf16":
        found[f"{size.requests} at once bf16"] = lambda: together(many)
        found["one by one bf16"] = lambda: together(many[:1])
    return found


def transformers(folder: Path, size: Size) -> dict[str, Callable[[], float]]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()

    def run(prompt: int, tokens: int) -> float:
        ids = torch.arange(1, prompt + 1)[None]
        options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
        return _seconds(lambda: model.generate(ids, attention_mask=torch.ones_like(ids), **options))

    def decode() -> float:
        return size.tokens / (run(size.prompt, size.tokens + 1) - run(size.prompt, 1))

    return {"decode bf16": decode, "prefill bf16": lambda: size.prefill / run(size.prefill, 1)}


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    with torch.inference_mode():
        work()
    return time.perf_counter() - start


def ceilings(bytes_read: int = 2**29) -> dict[str, float]:
    """Bytes/s of reading memory with all threads, FLOP/s of a large bfloat16 product."""
    from modicum.bench.ceilings import measure

    block = torch.ones(bytes_read // 8, dtype=torch.int64)
    best = min(_seconds(lambda: block.sum()) for _ in range(4))
    return {"read_bytes_per_s": block.nbytes / best, **measure()}


# the run ---------------------------------------------------------------------------------------------


def measure(
    size: Size, *, engines: list[str] | None = None, seed: int = 0, progress: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Everything `modicum bench engine` says, as plain values. `engines` limits who takes part."""
    from modicum.bench import engine_peers
    from modicum.serve import native

    rows: dict[tuple[str, str], Row] = {}
    skipped: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="modicum-bench-") as place:
        folder = Path(place) / "model"
        make_folder(size, folder, seed)
        makers: dict[str, Callable[[], dict[str, Callable[[], float]]]] = {
            f"modicum {form}": functools.partial(modicum, folder, size, form) for form in FORMS
        }
        makers[BASE] = lambda: transformers(folder, size)
        for name, (reason, maker) in engine_peers.peers(folder, size).items():
            if reason:
                skipped[name] = reason
            else:
                makers[name] = maker
        timed: dict[str, dict[str, Callable[[], float]]] = {}
        for name, maker in makers.items():
            if engines and name.split()[0] not in engines:
                continue
            try:
                timed[name] = maker()
            except Exception as error:
                if name in (BASE,) or name.startswith("modicum"):
                    raise
                skipped[name] = f"{type(error).__name__}: {error}".splitlines()[0]
        for columns in timed.values():  # first calls allocate and compile; they do not count
            for work in columns.values():
                work()
        ceiling = [ceilings()]
        for turn in range(size.rounds):
            for name, columns in timed.items():
                for column, work in columns.items():
                    engine = name.split()[0]
                    rows.setdefault((engine, column), Row(engine, column)).rates.append(work())
                    if progress:
                        progress(f"round {turn + 1}/{size.rounds}: {name}, {column}")
            ceiling.append(ceilings())
        checks = identical(folder, size) if engines is None or "modicum" in engines else {}
        timed.clear()
        gc.collect()
    best = {name: max(c[name] for c in ceiling) for name in ceiling[0]}
    return {
        "rows": [row.as_dict() | {"ratio": _ratio(row, rows)} for row in rows.values()],
        "ceilings": best,
        "share_of_read": _shares(rows, size, best["read_bytes_per_s"]),
        "checks": checks,
        "skipped": skipped,
        "native": native.reason(),
        "size": asdict(size),
        "threads": torch.get_num_threads(),
    }


def _ratio(row: Row, rows: dict[tuple[str, str], Row]) -> float | None:
    """To transformers in bfloat16 at the same kind of work; of many requests, to one by one."""
    kind = row.column.split()[0]
    base = rows.get((row.engine, "one by one bf16") if "at once" in row.column else (BASE, f"{kind} bf16"))
    return row.median / base.median if base else None


def _shares(rows: dict[tuple[str, str], Row], size: Size, read: float) -> dict[str, float]:
    """Of a decoded token's bytes of weights over its time, the share of the rate at which memory is read."""
    from modicum.model.attach import attach

    shares = {}
    for form, choice in FORMS.items():
        row = rows.get(("modicum", f"decode {form}"))
        if row is None:
            continue
        model = Decoder(shape_of(size), init=False).to(torch.bfloat16)
        if choice:
            attach(model, choice)
        total = sum(t.nbytes for name, t in model.layers.state_dict().items()) + sum(
            t.nbytes for t in model.lm_head.state_dict().values()
        )
        row.bytes = total
        shares[form] = total * row.median / read
    return shares


def identical(folder: Path, size: Size) -> dict[str, Any]:
    """Greedy tokens in float32 beside transformers', and both engines' bfloat16 logits beside float32's."""
    from transformers import AutoModelForCausalLM

    from modicum.model.folder import load_model
    from modicum.serve.config import EngineConfig
    from modicum.serve.engine import Engine
    from modicum.serve.request import SamplingParams

    ids = torch.arange(1, size.prompt + 1)[None]
    ones = torch.ones_like(ids)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        said = theirs.generate(ids, attention_mask=ones, max_new_tokens=size.tokens, do_sample=False, pad_token_id=0)
        want = theirs(ids).logits[0, -1]
    params = SamplingParams(temperature=0, max_tokens=size.tokens, ignore_eos=True)
    cache = f"{4 * (size.prompt + size.tokens)}tok"
    engine = Engine(load_model(folder, dtype=torch.float32), None, EngineConfig(cache=cache))
    same = engine.generate([ids[0].tolist()], params)[0].tokens == said[0, size.prompt :].tolist()
    half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    engine = Engine(load_model(folder), None, EngineConfig(cache=cache))
    caught: list[Any] = []
    runner = engine.runner

    def watched(*given: Any) -> Any:
        caught.append(runner(*given))
        return caught[-1]

    engine.runner = watched  # type: ignore[assignment]
    engine.generate([ids[0].tolist()], SamplingParams(temperature=0, max_tokens=1, ignore_eos=True))
    with torch.inference_mode():
        errors = {
            "modicum": float((caught[0][0].float() - want).norm() / want.norm()),
            BASE: float((half(ids).logits[0, -1].float() - want).norm() / want.norm()),
        }
    return {"float32_tokens_equal": same, "tokens": size.tokens, "bf16_logit_error": errors}


def append(found: dict[str, Any], path: Path, seed: int) -> None:
    """One evidence record per column of each engine."""
    size, machine = found["size"], record.machine()
    shape = shape_of(Size(**size))
    axes = {
        "quality": {"metric": "tokens_per_s", "better": "higher", "unit": "tokens/s"},
        "cost": {"metric": "spread", "better": "lower", "unit": ""},
    }
    for row in found["rows"]:
        metrics = {"tokens_per_s": row["tokens_per_s"], "spread": row["spread"]}
        metrics |= {} if row["ratio"] is None else {"ratio": row["ratio"]}
        record.append(
            path,
            record.Record(
                port="engine",
                method=row["engine"],
                choice=f"{row['engine']}: {row['column']}",
                knobs={"column": row["column"]},
                baseline=BASE,
                seed=seed,
                run=fingerprint([size, machine, record.commit()]),
                scale=size,
                budget={},
                model={"name": "random llama-like", "parameters": shape.parameters()},
                data={"name": "token ids in order"},
                metrics=metrics | found["ceilings"],
                seconds=0.0,
                peak_bytes=0.0,
                flops=0.0,
                axes=axes,
                machine=machine,
                versions=record.versions(),
                commit=record.commit(),
                time=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            ),
        )
