"""engine: how fast the serving engine is beside other engines, on the same weights in the same run.

    modicum bench engine [--model MODEL] [--quick] [--json]

A model (a random Llama-like one in bfloat16, or the one given) is generated from by modicum, by
`transformers.generate`, and by llama.cpp where llama-cpp-python is installed, each in a process of its own: one that
crashes, hangs or is missing is reported with the reason, and the others go on. A measurement is a
column (`decode bf16`, `prefill int8`, ...) of one engine; rounds visit all of them in turn, so that a slow minute of
the machine falls on everybody, and a column's figure is the median over rounds with its spread. The same run measures
the machine's own ceilings: reading memory, and bfloat16 products. Ratios are to `transformers` in bfloat16.
"""

from __future__ import annotations

import contextlib
import datetime
import statistics
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from modicum.bench import engine_peers, record
from modicum.bench.engine_columns import EIGHT, FORMS, SOURCE, bits_of, load_in, make_folder, seconds_of, shape_of
from modicum.bench.engine_worker import QUICK, EngineFailed, Job, Size, Worker
from modicum.core.errors import ModicumError, UserError
from modicum.core.files import fingerprint
from modicum.core.gguf import GgufFile, file_in
from modicum.model.config import DecoderConfig
from modicum.model.decoder import Decoder

BASE = "transformers"
COLUMNS = "modicum.bench.engine_columns"
__all__ = ["QUICK", "Job", "Size", "append", "measure"]


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
    size: Size,
    *,
    engines: list[str] | None = None,
    model: str | None = None,
    limit: float = 300.0,
    seed: int = 0,
    more: Sequence[Job] = (),
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Everything `modicum bench engine` says, as plain values.

    engines limits who takes part; model is one to measure instead of a random one; limit: seconds an engine may take
    to get ready, and for each measurement; more: further engines.
    """
    from modicum.serve import native

    rows: dict[tuple[str, str], Row] = {}
    workers: list[Worker] = []
    with tempfile.TemporaryDirectory(prefix="modicum-bench-") as scratch, contextlib.ExitStack() as stack:
        folder = Path(scratch) / "model"
        size, shape, kept = _prepare(size, model, folder, seed)
        skipped = {k: why for k, why in engine_peers.absent().items() if not engines or k in engines}
        for job in [*_jobs(kept, folder, skipped, engines), *more]:
            try:
                worker = Worker(job, folder, size, torch.get_num_threads(), limit)
                stack.callback(worker.close)
            except EngineFailed as error:
                skipped[job.name] = str(error)
                continue
            skipped |= {f"{job.engine} {form}": why for form, why in worker.skipped.items()}
            if job.engine in ("modicum", BASE) and worker.broken:
                raise ModicumError(f"{job.engine} {worker.broken[0]}: {worker.skipped[worker.broken[0]]}")
            workers.append(worker)
        ceiling = []
        for turn in range(size.rounds + 1):  # first calls allocate and compile; they do not count
            for worker in list(workers):
                try:
                    for column in worker.columns:
                        rate = worker.time(column)
                        if turn:
                            engine = worker.job.engine
                            rows.setdefault((engine, column), Row(engine, column)).rates.append(rate)
                            if progress:
                                progress(f"round {turn}/{size.rounds}: {engine}, {column}")
                except EngineFailed as error:
                    skipped[worker.job.name] = f"{column}: {error}"
                    workers.remove(worker)
                    for lost in worker.columns:
                        rows.pop((worker.job.engine, lost), None)
            ceiling.append(ceilings())
        checks = {}
        for worker in workers:
            if worker.job.engine == "modicum":
                checks = worker.call("modicum.bench.engine:identical", str(folder), asdict(size))
    best = {name: max(c[name] for c in ceiling) for name in ceiling[0]}
    return {
        "rows": [row.as_dict() | {"ratio": _ratio(row, rows)} for row in rows.values()],
        "ceilings": best,
        "share_of_read": _fractions_of_read(rows, shape, best["read_bytes_per_s"]),
        "checks": checks,
        "skipped": skipped,
        "native": native.reason(),
        "size": asdict(size),
        "model": {"name": model or "random llama-like", "parameters": shape.parameters()},
        "threads": torch.get_num_threads(),
    }


def _prepare(size: Size, model: str | None, folder: Path, seed: int) -> tuple[Size, DecoderConfig, str | None]:
    """Write the dense folder to measure; its size and shape, and the type of the GGUF file it came from, if any."""
    from modicum.compress.export import merged, write_folder
    from modicum.model.folder import find_folder, load_config, load_model

    if model is None:
        make_folder(size, folder, seed)
        return size, shape_of(size), None
    source = find_folder(model)
    kept, file = None, file_in(source)
    if file is not None:
        types = [t.type for n, t in GgufFile(file).tensors.items() if n.startswith("blk.") and len(t.shape) == 2]
        kept = Counter(types).most_common(1)[0][0].lower()
        (folder.parent / SOURCE).symlink_to(source.resolve())
        (folder.parent / f"{kept}.gguf").symlink_to(file.resolve())
    loaded = load_model(source, dtype="bfloat16")
    merged(loaded)
    write_folder(loaded, folder, source)
    shape = load_config(folder)
    if shape.context_length < (longest := max(size.prefill, size.prompt + size.answer + size.drafts)) + 1:
        raise UserError(f"{model} has a context of {shape.context_length} tokens; bench engine needs {longest + 1}")
    size = replace(
        size, layers=shape.layers, width=shape.width, heads=shape.heads, kv_heads=shape.kv_heads,
        mlp_width=shape.mlp_width, vocab=shape.vocab_size,
    )  # fmt: skip
    return size, shape, kept


def _jobs(kept: str | None, folder: Path, skipped: dict[str, str], engines: list[str] | None) -> list[Job]:
    """Who is measured in what forms. Writes the files for llama.cpp; where that cannot be, it is skipped."""
    own = [kept, kept + EIGHT] if kept else []
    jobs = [Job("modicum", f"{COLUMNS}:modicum", (*FORMS, *own)), Job(BASE, f"{COLUMNS}:transformers", ("bf16",))]
    if "llama.cpp" not in skipped and (not engines or "llama.cpp" in engines):
        try:
            _write_gguf(folder)
        except UserError as error:
            skipped["llama.cpp"] = str(error)
        else:
            forms = [*engine_peers.GGUF_TYPES, *own[:1]]
            jobs += [Job("llama.cpp", "modicum.bench.engine_peers:llama_cpp", (form,)) for form in forms]
    return [job for job in jobs if not engines or job.engine in engines]


def _write_gguf(folder: Path) -> None:
    from modicum.compress.export import plan, write
    from modicum.model.folder import load_model
    from modicum.model.gguf.write import Types

    model = load_model(folder)
    tokenizer = folder if (folder / "tokenizer.json").exists() else None
    for form, kind in engine_peers.GGUF_TYPES.items():
        types = Types(matrices=kind)
        write(model, folder.parent / f"{form}.gguf", types, plan(model, types, tokenizer), folder.name)


def _ratio(row: Row, rows: dict[tuple[str, str], Row]) -> float | None:
    """To transformers in bfloat16 at the same work; of many requests to one by one, of drafts to none."""
    kind, form = row.column.split()[0], row.column.split()[-1]
    own = {"at once": "one by one bf16", "drafts": f"decode {form}"}
    of = next((column for words, column in own.items() if words in row.column), None)
    base = rows.get((row.engine, of) if of else (BASE, f"{kind} bf16"))
    return row.median / base.median if base else None


def _fractions_of_read(rows: dict[tuple[str, str], Row], shape: DecoderConfig, read: float) -> dict[str, float]:
    """Of a decoded token's bytes of weights over its time, the share of the rate at which memory is read."""
    from modicum.model.attach import attach

    fractions = {}
    for form, (choice, _) in FORMS.items():
        row = rows.get(("modicum", f"decode {form}"))
        if row is None:
            continue
        with torch.device("meta"):
            model = Decoder(shape).to(torch.bfloat16)
        if choice:
            attach(model, choice)
        total = sum(t.nbytes for name, t in model.layers.state_dict().items()) + sum(
            t.nbytes for t in model.lm_head.state_dict().values()
        )
        row.bytes = total
        fractions[form] = total * row.median / read
    return fractions


def identical(path: str, knobs: dict[str, Any]) -> dict[str, Any]:
    """Greedy tokens in float32 beside transformers', and both engines' bfloat16 logits beside float32's."""
    from transformers import AutoModelForCausalLM

    from modicum.model.folder import load_model
    from modicum.serve.config import EngineConfig
    from modicum.serve.engine import Engine
    from modicum.serve.request import SamplingParams

    folder, size = Path(path), Size(**knobs)
    ids = torch.arange(1, size.prompt + 1)[None]
    ones = torch.ones_like(ids)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        output = theirs.generate(ids, attention_mask=ones, max_new_tokens=size.tokens, do_sample=False, pad_token_id=0)
        want = theirs(ids).logits[0, -1]
    params = SamplingParams(temperature=0, max_tokens=size.tokens, ignore_eos=True)
    cache = f"{4 * (size.prompt + size.tokens)}tok"
    engine = Engine(load_model(folder, dtype=torch.float32), None, EngineConfig(cache=cache))
    same = engine.generate([ids[0].tolist()], params)[0].tokens == output[0, size.prompt :].tolist()
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

    config = EngineConfig(cache=f"{4 * size.prompt}tok", activation_bits=bits_of(form))
    engine = Engine(load_in(folder, form), None, config)
    caught: list[Any] = []
    runner = engine.runner

    def watched(*given: Any) -> Any:
        caught.append(runner(*given))
        return caught[-1]

    engine.runner = watched  # type: ignore[assignment]
    engine.generate([list(range(1, size.prompt + 1))], SamplingParams(temperature=0, max_tokens=1, ignore_eos=True))
    return caught[0][0].float()


def append(result: dict[str, Any], path: Path, seed: int, *, bench: str = "engine", base: str = BASE) -> None:
    """One line per column of each engine: a format of its own, beside the ports' records."""
    size, machine = result["size"], record.machine()
    axes = {
        "quality": {"metric": "tokens_per_s", "better": "higher", "unit": "tokens/s"},
        "cost": {"metric": "spread", "better": "lower", "unit": ""},
    }
    for row in result["rows"]:
        metrics = {"tokens_per_s": row["tokens_per_s"], "spread": row["spread"]}
        metrics |= {} if row["ratio"] is None else {"ratio": row["ratio"]}
        metrics |= {"losses": row["losses"]} if "losses" in row else {}
        record.append_line(
            path,
            {
                "port": bench,
                "method": row["engine"],
                "choice": f"{row['engine']}: {row['column']}",
                "knobs": {"column": row["column"]},
                "baseline": base,
                "seed": seed,
                "run": fingerprint([size, result["model"]["name"], machine, record.commit()]),
                "scale": size,
                "budget": {},
                "model": result["model"],
                "data": {"name": result.get("data", "token ids in order")},
                "metrics": metrics | result["ceilings"],
                "seconds": 0.0,
                "peak_bytes": 0.0,
                "flops": 0.0,
                "axes": axes,
                "machine": machine,
                "versions": record.versions(),
                "commit": record.commit(),
                "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "claim": {},
                "schema": 1,
            },
        )
