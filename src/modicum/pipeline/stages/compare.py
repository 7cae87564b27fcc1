"""compare: every model of a chain beside the first: bits per byte of each corpus, divergence per token, bytes.

`original` is the published model that the chain began with; without it the first model of the recipe is what the others
are compared with. All see the same sequences of held-out text, so that differences are paired: KL(original || model) in
nats per token with its standard error over sequences, and bits per byte of each corpus. A chain shows link by link
where quality went and what came back.
"""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from pydantic import Field
from torch import Tensor

from modicum.budget import Cost
from modicum.compress.divergence import BATCH, Score, original, scores
from modicum.core.errors import UserError
from modicum.core.files import tree_bytes
from modicum.data.curate import Curation
from modicum.data.tokenizer import Tokenizer
from modicum.model.folder import load_model
from modicum.pipeline import costs
from modicum.pipeline.context import Context
from modicum.pipeline.models import folder_of
from modicum.pipeline.plan import Planner
from modicum.pipeline.section import Strict
from modicum.pipeline.stage import Finished, Inputs, Report, Stage, StagePlan
from modicum.pipeline.stages.compressor import published
from modicum.pipeline.stages.evaluate import heldout_texts
from modicum.pipeline.worker import trim_allocator

WEIGHTS = (".safetensors", ".gguf")


class Section(Strict):
    original: str | None = None  # what the others are compared with; None: the first model of the recipe
    sequences: int = Field(16, ge=2)  # of held-out text, of each corpus
    length: int = Field(256, ge=2)  # tokens of each


class Compare(Stage[Section]):
    order = 87
    needs, several, gives = ("corpus", "model"), ("corpus", "model"), ("comparison",)

    def models(self, section: Section) -> dict[str, str]:
        return {"original": section.original} if section.original else {}

    def plan(self, section: Section, inputs: Inputs, planner: Planner) -> StagePlan:
        """A pass of every model timed; the original's predictions stay in memory."""
        models = inputs.all("model")
        if section.original:
            models = [published("compare", section, section.original), *models]
        corpora, seconds, flops, peak = len(inputs.all("corpus")), 0.0, 0.0, 0.0
        rows = section.sequences * corpora
        for model in models:
            shape = costs.subject_shape(planner, model)
            seconds += rows * costs.forward_seconds(planner, model, "fp32", 1, section.length)
            flops += rows * section.length * shape.flops_per_token(section.length)
            kept = 2.0 * rows * section.length * shape.vocab_size
            peak = max(peak, kept + 16.0 * BATCH * section.length * shape.vocab_size + 4.0 * shape.parameters())
        tokens = float(rows * section.length * len(models))
        return StagePlan(Cost(tokens=tokens, flops=flops, seconds=1.5 * seconds, peak_bytes=peak), {}, "passes timed")

    def run(self, section: Section, inputs: Inputs, context: Context) -> dict[str, Any]:
        models = {m.name: Path(m["folder"]) for m in inputs.all("model")}
        if section.original:
            models = {"original": folder_of(section.original)} | models
        first = next(iter(models.values()))
        tokenizer = Tokenizer.load(first)
        texts = {c.name: _sequences(c["folder"], tokenizer, section, c.name) for c in inputs.all("corpus")}
        before: dict[str, Tensor] = {}
        reference: dict[str, list[Score]] = {}
        rows: list[dict[str, Any]] = []
        tokens = flops = 0.0
        for name, folder in models.items():
            model = load_model(folder, dtype="float32")
            row: dict[str, Any] = {"model": name, "bytes": weight_bytes(folder), "bits_per_byte": {}, "change": {}}
            divergences: list[float] = []
            for corpus, (tokens_NT, sizes) in texts.items():
                if corpus not in before:
                    before[corpus], nats = original(model, tokens_NT)
                    reference[corpus] = [Score(0.0, n) for n in nats]
                    made = reference[corpus]
                else:
                    made = scores(model, tokens_NT, before[corpus])
                base = reference[corpus]
                row["bits_per_byte"][corpus] = sum(s.nats for s in made) / math.log(2) / sum(sizes)
                row["change"][corpus] = _change(made, base, sizes)
                divergences += [s.kl for s in made]
                tokens += tokens_NT.numel()
                flops += tokens_NT.numel() * model.config.flops_per_token(section.length)
                trim_allocator()
            row |= {
                "kl": statistics.fmean(divergences),
                "kl_stderr": statistics.stdev(divergences) / len(divergences) ** 0.5,
            }
            rows.append(row)
            context.events.emit("compare", **row)
            del model
        return {"rows": rows, "cost": {"tokens": tokens, "flops": flops}}

    def miniature(self, section: Section) -> tuple[Section, dict[str, Any]]:
        return Section(sequences=2, length=16), {}

    def report(self, done: Finished) -> Report:
        rows = done.figures["rows"]
        corpora = list(rows[0]["bits_per_byte"])
        lines = [
            f"{row['model']}: {row['bytes'] / 2**20:.1f} MiB, KL {row['kl']:.3f} ± {2 * row['kl_stderr']:.3f}, "
            + ", ".join(f"{row['bits_per_byte'][c]:.3f} bits per byte on {c}" for c in corpora)
            for row in rows
        ]
        return Report(lines=lines, values={"rows": rows, "corpora": corpora}, rank=10)


def weight_bytes(path: Path) -> int:
    """Bytes of a GGUF file, or of the weight files of a folder."""
    if path.is_file():
        return path.stat().st_size
    files = [p for p in path.iterdir() if p.suffix in WEIGHTS]
    return sum(p.stat().st_size for p in files) or tree_bytes(path)


def _sequences(folder: str, tokenizer: Tokenizer, section: Section, name: str) -> tuple[Tensor, list[int]]:
    """tokens_NT of the held-out documents, one after another, and the bytes that each sequence predicts."""
    from modicum.compress import calibration

    curation = Curation.load(folder)
    texts = heldout_texts(curation, 16.0 * section.sequences * section.length)
    tokens_NT = calibration.sequences(texts, tokenizer, section.sequences, section.length)
    if len(tokens_NT) < 2:
        raise UserError(
            f"{name} has held-out text for {len(tokens_NT)} sequence of {section.length} tokens; give more text, or a "
            "shorter length"
        )
    decoded = (tokenizer.decode(row[1:].tolist()) for row in tokens_NT)
    return tokens_NT, [max(1, len(text.encode("utf-8", "surrogatepass"))) for text in decoded]


def _change(made: list[Score], base: list[Score], sizes: list[int]) -> list[float]:
    """Bits per byte more than the original's, and the paired standard error over sequences."""
    more = [(m.nats - b.nats) / math.log(2) for m, b in zip(made, base, strict=True)]
    mean = sum(more) / sum(sizes)
    left = [m - mean * size for m, size in zip(more, sizes, strict=True)]
    spread = math.sqrt(sum(x * x for x in left) / (len(left) - 1) * len(left))
    return [mean, spread / sum(sizes)]
