"""What goes with what: one resolver for training, adapting, compressing, serving, benches and recipes.

A choice is a list of `Member`s: the chosen methods, and the settings beside them (two processes, a clipped gradient,
a model with sliding windows). Each declares the capabilities that it `provides`, `requires` and `conflicts` with:

    requires    some other member must provide the capability
    conflicts   no other member may provide it

A method provides its port's name and `PORT/KEY` besides its own capabilities, so `conflicts = frozenset({"linear"})`
refuses every linear form. Two members that provide the same capability and conflict with it exclude each other.

`resolve` refuses the first pair that does not go together, by name, with what to type instead, before anything is
computed. Nothing else checks combinations. A method's file may declare `BRINGS = ("transform/meco",)`, also with
knobs (`"averaging/lawa:weights=ema"`): `complete` adds those companion methods to a choice.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from modicum.core import registry
from modicum.core.choice import Choice
from modicum.core.errors import UserError

# The capabilities that methods of this project declare, with what each means. Plug-ins may add their own.
CAPABILITIES = {
    "activation_memory": "decides how activations are kept for the backward pass",
    "adapter": "a trained update on a frozen base weight",
    "adapter_base": "a frozen weight under an adapter: passes gradients on to its input",
    "attention_pattern": "layers that attend under a pattern other than a window",
    "calibration": "fits given weights to what they do for a text (calibration data)",
    "calibration_text": "text that shows what the layers are given",
    "chunked_prefill": "prompts are computed over several steps",
    "compile": "layers compiled with torch.compile",
    "document_mask": "attention stays within a document",
    "elastic": "weights in blocks, of which a prefix may be loaded",
    "embedding": "single rows are cheap to compute, so that it may store a token embedding",
    "eviction": "drops KV-cache entries, or observes them while they are computed",
    "factors": "weights as a product of two trained factors",
    "fit": "approximates given weights",
    "fsdp": "parameters sharded over several processes",
    "gqa": "several query heads share a key and value head",
    "loss_memory": "decides how the loss is computed from the last layer's output",
    "merge": "linear in its input, so that it can become a plain weight again",
    "pre_norm": "a norm before each attention and MLP",
    "prefix_cache": "requests with a common prefix share its cache blocks",
    "reserved_tokens": "ids at the vocabulary's end that no text uses",
    "sliding_window": "layers that attend to the last tokens only",
    "speculative_decoding": "draft tokens are verified and may be rejected",
    "step_gradients": "all gradients of a step are available before any weight changes",
    "trainable": "has parameters that training changes",
    "uneven_layers": "layers of different shapes",
}

_BRINGS = re.compile(r"^BRINGS\s*=\s*(\(.*?\))", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Member:
    """One member of a choice. `label`: how an error names it. `remedy`: what to type to remove it."""

    label: str
    provides: frozenset[str] = frozenset()
    requires: frozenset[str] = frozenset()
    conflicts: frozenset[str] = frozenset()
    remedy: str = ""
    port: str = ""


def member(port: str, choice: object, remedy: str = "") -> Member:
    """A method of `port` with the knobs of `choice`, as a member. Imports the method."""
    parsed = Choice.parse(port, choice)
    cls: type[registry.Method] = registry.load(port, parsed.method).cls
    declared = cls.capabilities(parsed.config())
    names = {port, f"{port}/{parsed.method}"}
    label = f"{port} {parsed.method!r}"
    return Member(label, declared.provides | names, declared.requires, declared.conflicts, remedy, port)


def setting(
    label: str,
    *,
    provides: Iterable[str] = (),
    requires: Iterable[str] = (),
    conflicts: Iterable[str] = (),
    remedy: str = "",
) -> Member:
    """A member that is not a method: `setting("clip=1", requires={"step_gradients"}, remedy="set clip=0")`."""
    return Member(label, frozenset(provides), frozenset(requires), frozenset(conflicts), remedy)


def resolve(members: Sequence[Member], *, options: Mapping[str, str] | None = None, where: str = "") -> None:
    """Raise `UserError` for the first members that do not go together.

    options: what to write for a capability that nothing provides ({"document_mask": "packing=concat:mask=true"}), or
    the option that takes methods of a port ({"linear": "form"}), for the error's last part. where: its first part.
    """
    for number, one in enumerate(members):
        others = [*members[:number], *members[number + 1 :]]
        for other in others:
            if shared := one.conflicts & other.provides:
                raise UserError(_prefix(where) + _conflict(one, other, min(shared)))
        provided = frozenset().union(*(other.provides for other in others))
        for word in sorted(one.requires - provided):
            raise UserError(_prefix(where) + _missing(one, others, word, options or {}))


def complete(choices: Sequence[Choice]) -> list[Choice]:
    """`choices` and the methods that they bring along (`BRINGS`), each once.

    What was chosen stays as chosen: nothing is brought into a port that takes one method and has it.
    """
    completed = list(choices)
    for choice in completed:  # grows while iterating: an added method may bring more
        for half in brings(choice.port, choice.method):
            several = registry.port(half.port).several
            if not any(c.port == half.port and (c.method == half.method or not several) for c in completed):
                completed.append(half)
    return completed


@cache
def brings(port: str, key: str) -> tuple[Choice, ...]:
    """The companion methods that a method's file names in its literal `BRINGS`; nothing is imported."""
    path = registry.methods(port)[key].path
    text = path.read_text(encoding="utf-8") if path else ""
    match = _BRINGS.search(text)
    if path:
        names = ast.literal_eval(match[1]) if match else ()
    else:  # a plug-in
        names = getattr(registry.load(port, key).module, "BRINGS", ())
    try:
        return tuple(Choice.parse(*name.split("/", 1)) for name in names)
    except UserError as error:
        raise UserError(f"{port}/{key} brings a method that does not exist; correct its BRINGS: {error}") from None


def _prefix(where: str) -> str:
    return f"{where}: " if where else ""


def _conflict(one: Member, other: Member, word: str) -> str:
    if word in one.provides and word in other.provides and word in CAPABILITIES:
        return f"{one.label} cannot be combined with {other.label}: each {CAPABILITIES[word]}; name one"
    remedy = other.remedy or one.remedy or "leave one of them out"
    one, other = (other, one) if other.port and not one.port else (one, other)
    return f"{one.label} cannot be combined with {other.label}; {remedy}"


def _missing(one: Member, others: Sequence[Member], word: str, options: Mapping[str, str]) -> str:
    meaning = f" ({CAPABILITIES[word]})" if word in CAPABILITIES else ""
    providing = registry.providers(word)
    at_fault = next((other for other in others if other.port in providing), None)
    if at_fault is not None:
        remedy = one.remedy or options.get(word) or _choose(at_fault.port, providing[at_fault.port], options)
        return f"{at_fault.label} cannot be combined with {one.label}, which requires {word}{meaning}; {remedy}"
    remedy = options.get(word) or one.remedy
    if not remedy:
        remedy = " or ".join(_choose(port, keys, options) for port, keys in providing.items()) or "leave it out"
    return f"{one.label} requires {word}{meaning}, which nothing chosen here provides; {remedy}"


def _choose(port: str, keys: Sequence[str], options: Mapping[str, str]) -> str:
    return f"choose {options.get(port, port)}={' or '.join(keys[:4])}"
