"""engine: how fast the serving engine is beside other engines, on the same weights in the same run.

    modicum bench engine [--quick] [--json]

One random Llama-like model in bfloat16, written to a folder, is generated from by modicum, by
`transformers.generate`, and by llama-cpp-python and openvino-genai where they are installed. A measurement is a
column (`decode bf16`, `prefill int8`, ...) of one engine; rounds visit all of them in turn, so that a slow minute of
the machine falls on everybody, and a column's figure is the median over rounds with its spread. The same run measures
the machine's own ceilings: reading memory, and bfloat16 products. Ratios are to `transformers` in bfloat16.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import gc
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from modicum.bench import record
from modicum.bench.engine_columns import (
    FORMS,
    QUICK,
    Size,
    load_in,
    make_folder,
    modicum,
    seconds_of,
    shape_of,
    transformers,
)
from modicum.core.errors import UserError
from modicum.core.files import fingerprint
from modicum.model.decoder import Decoder

BASE = "transformers"
__all__ = ["QUICK", "Size", "append", "measure"]


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


def ceilings(bytes_read: int = 2**29) -> dict[str, float]:
    """Bytes/s of reading memory with all threads, FLOP/s of a large bfloat16 product."""
    from modicum.bench.ceilings import measure

    block = torch.ones(bytes_read // 8, dtype=torch.int64)
    best = min(seconds_of(lambda: block.sum()) for _ in range(4))
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
                if name == BASE or (name.startswith("modicum") and not isinstance(error, UserError)):
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
    """To transformers in bfloat16 at the same work; of many requests to one by one, of drafts to none."""
    kind, form = row.column.split()[0], row.column.split()[-1]
    own = {"at once": "one by one bf16", "drafts": f"decode {form}"}
    of = next((column for words, column in own.items() if words in row.column), None)
    base = rows.get((row.engine, of) if of else (BASE, f"{kind} bf16"))
    return row.median / base.median if base else None


def _shares(rows: dict[tuple[str, str], Row], size: Size, read: float) -> dict[str, float]:
    """Of a decoded token's bytes of weights over its time, the share of the rate at which memory is read."""
    from modicum.model.attach import attach

    shares = {}
    for form, (choice, _) in FORMS.items():
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
    with torch.inference_mode():
        errors = {
            "modicum": _off(_logits(folder, size, "bf16"), want),
            BASE: _off(half(ids).logits[0, -1].float(), want),
        }
    eight = {}
    for form, exact in (("w8a8", "int8"), ("w4a8", "int4")):
        with contextlib.suppress(UserError):  # kernels that this machine has not got
            eight[form] = _off(_logits(folder, size, form), _logits(folder, size, exact))
    return {
        "float32_tokens_equal": same,
        "tokens": size.tokens,
        "bf16_logit_error": errors,
        "eight_bit_logit_error": eight,
    }


def _off(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / want.norm())


def _logits(folder: Path, size: Size, form: str) -> torch.Tensor:
    """Of the token that follows the prompt, by modicum's engine."""
    from modicum.serve.config import EngineConfig
    from modicum.serve.engine import Engine
    from modicum.serve.request import SamplingParams

    config = EngineConfig(cache=f"{4 * size.prompt}tok", activation_bits=FORMS[form][1])
    engine = Engine(load_in(folder, form), None, config)
    caught: list[Any] = []
    runner = engine.runner

    def watched(*given: Any) -> Any:
        caught.append(runner(*given))
        return caught[-1]

    engine.runner = watched  # type: ignore[assignment]
    engine.generate([list(range(1, size.prompt + 1))], SamplingParams(temperature=0, max_tokens=1, ignore_eos=True))
    return caught[0][0].float()


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
