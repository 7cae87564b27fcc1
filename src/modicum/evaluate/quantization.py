"""What compressing a model cost: bits per byte on the same text before and after, and what would cost less.

The difference is paired document by document. Where a form costs more than `TOLERATED`, a few others are fitted to the
same layers in memory and measured on the same text, so that the advice is a measurement too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from random import Random
from typing import Any

from modicum.core.choice import Choice
from modicum.core.errors import UserError
from modicum.evaluate.compare import paired_ratio
from modicum.evaluate.lm import LMScore, bits_per_byte
from modicum.evaluate.run import text_documents

TOLERATED = 0.02  # relative rise of bits per byte that passes without a warning
DOCUMENTS, CHARACTERS = 16, 1000  # of the sample: about 4,000 tokens, seconds on two cores for 135M parameters
ALTERNATIVES = ("int4:group=32", "int8:group=64", "int8")


@dataclass(frozen=True)
class Effect:
    """bits_per_byte before and after; `change` of their ratio - 1 with its standard error; `kind`: of the change."""

    form: str
    before: float
    after: float
    change: float
    stderr: float
    bits_per_weight: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def hurts(self) -> bool:
        """Beyond what is tolerated, and beyond what chance would do on this sample."""
        return self.change > TOLERATED and self.change > 2 * self.stderr


def sample(source: str = "python", seed: int = 0) -> list[str]:
    """The beginnings of some documents of a text source (by default this Python's own documentation)."""
    texts = [text for _, text in text_documents(source, limit=4000, split="train") if len(text) > CHARACTERS // 2]
    if not texts:
        raise UserError(f"{source} holds no document of {CHARACTERS // 2} characters to measure on; give other text")
    return [t[:CHARACTERS] for t in Random(seed).sample(texts, min(DOCUMENTS, len(texts)))]


def effect(form: str, before: LMScore, after: LMScore, bits_per_weight: float) -> Effect:
    """Of two scores of the same documents."""
    paired_change = paired_ratio(list(after.nats_N), list(before.nats_N), list(before.bytes_N))
    base = before.nats / before.bytes
    return Effect(
        form,
        before.bits_per_byte,
        after.bits_per_byte,
        after.bits_per_byte / before.bits_per_byte - 1,
        paired_change["stderr"] / base,
        bits_per_weight,
    )


def score(model: Any, tokenizer: Any, texts: Sequence[str], progress: Callable[[int], None] | None = None) -> LMScore:
    return bits_per_byte(model, tokenizer, texts, sequence_length=512, advance=progress)


def alternatives(
    folder: str,
    tokenizer: Any,
    texts: Sequence[str],
    before: LMScore,
    worse: Effect,
    targets: Iterable[str],
    embeddings: str | None = None,
) -> list[Effect]:
    """Forms with more bits than `worse`, fitted to the same layers and measured on the same text, fewest bits first.

    Ends with the first that is within what is tolerated.
    """
    from modicum.model import attach
    from modicum.model.folder import load_model

    effects: list[Effect] = []
    for form in ALTERNATIVES:
        if form == worse.form:
            continue
        model = load_model(folder)
        plan = dict.fromkeys(targets, form) | ({"embed": embeddings} if embeddings else {})
        made = attach.attach(model, {p: Choice.parse("linear", f) for p, f in plan.items()})
        bits = 8 * sum(f.nbytes() for f in made.values()) / sum(f.in_features * f.out_features for f in made.values())
        if bits <= worse.bits_per_weight:
            continue
        effects.append(effect(form, before, score(model, tokenizer, texts), bits))
        if not effects[-1].hurts:
            break
    return effects


def advice(worse: Effect, others: Sequence[Effect]) -> list[str]:
    """Lines for a person: that the form hurts, and what was measured to hurt less."""
    lines = [
        f"warning: {worse.form} costs {worse.change:+.1%} bits per byte on this sample "
        f"(± {2 * worse.stderr:.1%}); text it writes may repeat itself or lose the thread"
    ]
    for other in others:
        lines.append(
            f"  --form {other.form}: {other.change:+.1%} at {other.bits_per_weight:.2f} bits per weight "
            f"instead of {worse.bits_per_weight:.2f}"
        )
    return lines
