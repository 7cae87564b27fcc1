"""modicum: any shape that `DecoderConfig` can describe, layer by layer, under modicum's own names.

Other programs refuse such a folder by its model_type. It is for models that no other family has words for: layers of
different widths or heads, attention patterns, mixers.
"""

from dataclasses import asdict, fields
from typing import Any

from modicum.model.config import DecoderConfig, Rope
from modicum.model.families import Family, Keys

SIZES = ("vocab_size", "width", "layers", "heads", "kv_heads", "head_dim", "mlp_width")
APART = {*SIZES, "family", "overrides", "rope", "bos_id", "eos_ids", "pad_id", "source"}
PLAIN = tuple(f.name for f in fields(DecoderConfig) if f.name not in APART)


def _read(hf: Keys) -> Keys:
    given: Keys = {name: hf[name] for name in PLAIN if name in hf}
    if "rope" in hf:
        given["rope"] = Rope(**hf["rope"])
    given["overrides"] = tuple({name: _field(name, of[name]) for name in of} for of in hf.get("overrides", ()))
    return given


def _field(name: str, value: Any) -> Any:
    return Rope(**value) if name == "rope" and value is not None else value


def _write(config: DecoderConfig) -> Keys:
    overrides = [{n: asdict(v) if isinstance(v, Rope) else v for n, v in of.items()} for of in config.overrides]
    return {n: getattr(config, n) for n in PLAIN} | {"rope": asdict(config.rope), "overrides": overrides}


FAMILY = Family(
    model_types=("modicum",),
    architecture="ModicumDecoder",
    keys={name: name for name in SIZES},
    read=_read,
    write=_write,
    rules=(),  # parameters are stored under their own names
)
