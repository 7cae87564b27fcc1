"""attention: what a pattern loses on a decoder trained with full attention, against prefill seconds.

Documents of the held-out side are put together to sequences of each of `lengths`; the pattern is applied
to every layer of the trained decoder without training it again. Agreement is the share of positions whose
most likely next token stays the same. Both sides run through the same block-wise attention.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from modicum.bench import training
from modicum.bench.measurement import Axes, Axis, Measurement, Settings
from modicum.budget import Cost
from modicum.core import registry
from modicum.core.choice import Choice
from modicum.core.errors import UserError
from modicum.model.attend import Attend, pattern_attend
from modicum.model.decoder import Decoder

AXES = Axes(quality=Axis("bits_per_token"), cost=Axis("prefill_seconds", "lower", "s"))
MODEL = "smollm2"
TIER = "laptop"


@dataclass(frozen=True, kw_only=True)
class Scale(training.Scale):
    sequence_length: int = 512
    batch_sequences: int = 2
    lengths: tuple[int, ...] = (512,)  # the last is the one judged
    sequences: int = 2  # of each length
    repeats: int = 1  # timed passes, of which the fastest counts
    block: int = 64


QUICK = Scale(**training.QUICK, lengths=(32, 64), sequences=2, repeats=1, block=16)


@torch.no_grad()
def measure(choice: Choice, seed: int, settings: Settings) -> Measurement:
    scale: Scale = settings.scale
    with torch.enable_grad():
        bench, model = training.pretrained(settings, seed, "bfloat16")
    pattern, causal = (
        registry.build("attention", choice),
        registry.build("attention", registry.port("attention").baseline),
    )
    text = [
        t
        for d in bench.corpus.heldout
        for t in [bench.tokenizer.start_id, *bench.tokenizer.encode(d.text, specials=False)]
    ]
    metrics: dict[str, float] = {}
    total = 0.0
    for length in scale.lengths:
        rows = min(scale.sequences, (len(text) - 1) // length)
        if rows < 1:
            raise UserError(
                f"the held-out side has {len(text)} tokens, less than one sequence of {length}; give "
                "--scale heldout_bytes=... or shorter lengths"
            )
        first = (seed * 977) % max(1, len(text) - rows * length)
        tokens_BT = torch.tensor(text[first : first + rows * length + 1])[: rows * length].view(rows, length)
        tokens_BT = tokens_BT.to(model.device)
        ours, plain = (pattern_attend(p, settings.device, scale.block) for p in (pattern, causal))
        loss, best_BT, seconds = prefill(model, tokens_BT, ours, scale.repeats)
        _, truth_BT, _ = prefill(model, tokens_BT, plain, 1)
        metrics |= {
            f"agreement_{length}": float((best_BT == truth_BT).float().mean()),
            f"prefill_seconds_{length}": seconds,
            f"keys_per_query_{length}": pattern.keys_per_query(length),
        }
        metrics |= {"bits_per_token": loss, "prefill_seconds": seconds}
        total += seconds
    return Measurement(
        metrics=metrics,
        cost=Cost(seconds=total),
        data=bench.corpus.record,
        model=bench.model_record(model, "small decoder, trained"),
    )


def prefill(model: Decoder, tokens_BT: Tensor, attend: Attend, repeats: int) -> tuple[float, Tensor, float]:
    """(bits per token, most likely next token BT, seconds of the fastest pass)."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        h_BTD = model.hidden(tokens_BT, attend=attend)
        seconds.append(time.perf_counter() - start)
    loss, best = 0.0, []
    for h_TD, tokens_T in zip(h_BTD, tokens_BT, strict=True):
        logits_TV = model.head(h_TD).float()
        loss += float(torch.nn.functional.cross_entropy(logits_TV[:-1], tokens_T[1:], reduction="sum"))
        best.append(logits_TV.argmax(-1))
    return loss / (tokens_BT[:, 1:].numel() * math.log(2)), torch.stack(best), min(seconds[1:])
