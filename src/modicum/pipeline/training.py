"""What the training stages share: the data they read and the settings they run with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from modicum.core import registry
from modicum.core.errors import UserError
from modicum.data.curate import Curation
from modicum.data.stream import Stream
from modicum.model.config import DecoderConfig, llama_like
from modicum.model.decoder import Decoder
from modicum.model.folder import load_config, load_model
from modicum.model.patterns import set_attention, with_attention
from modicum.pipeline.recipe import Recipe
from modicum.pipeline.section import Strict
from modicum.train.config import TrainConfig, run_ports

if TYPE_CHECKING:
    from modicum.pipeline.stages.pretrain import Section as Pretrain

EVAL_SEQUENCES = 512  # held-out sequences behind every loss of a run
DTYPES = {"bf16": "bfloat16", "fp32": "float32", "bfloat16": "bfloat16", "float32": "float32"}


# What a recipe says of a training run; the rest is the recipe's own (seed) or the stage's (when it evaluates).
SETTINGS = (
    *("sequence_length", "batch_tokens", "micro_batch", "lr", "form", "targets", "clip", "masters", "dtype"),
    *("nonfinite", "compile"),
)


def train_config(section: Pretrain, shape: DecoderConfig | None, tokens: float, seed: int, **more: Any) -> TrainConfig:
    """shape: of the model, which the learning rate follows; None where that does not matter."""
    settings = {name: getattr(section, name) for name in SETTINGS}
    config = TrainConfig(
        tokens=tokens, seed=seed, eval_sequences=EVAL_SEQUENCES, **settings, **methods(section), **more
    )
    return config.for_width(shape.width, continued=bool(section.model)) if shape else config


def methods(section: Strict) -> dict[str, Any]:
    """The recipe's methods for training and its data, by their port."""
    return {port: value for port in run_ports() if (value := getattr(section, port, None)) is not None}


def training_stream(section: Pretrain, curation: Curation, total: float, seed: int) -> Any:
    p = section
    if p.recall is not None:
        from modicum.evaluate.recall import RecallConfig, RecallStream

        knobs = p.recall.model_dump(exclude={"vocabulary"}) | {"fractions": tuple(p.recall.fractions)}
        config = RecallConfig(**knobs | {"lengths": tuple(min(n, p.sequence_length) for n in p.recall.lengths)})
        return RecallStream(
            config,
            curation.tokenizer(),
            curation.shards("train"),
            sequence_length=p.sequence_length,
            total=total,
            seed=seed,
        )
    one_step = TrainConfig(steps=1, sequence_length=p.sequence_length, seed=seed, **methods(p))
    return one_step.stream(curation.shards("train"), total=total)


def heldout_stream(section: Pretrain, curation: Curation) -> Stream:
    config = TrainConfig(steps=1, sequence_length=section.sequence_length, **methods(section))
    stream: Stream = config.heldout_stream(curation.shards("heldout"))
    return stream


def shape_of(section: Pretrain, width: int, layers: int, vocab_size: int) -> DecoderConfig:
    """A Llama-style shape of this width and depth."""
    # A model that learns to recall knows no distance beyond its rows, and what serves it should know that.
    length = section.sequence_length
    context = length if section.recall else max(2048, length)
    return llama_like(vocab_size, width, layers, section.heads, context_length=context, attention=section.attention)


def given_shape(section: Pretrain, given: str) -> DecoderConfig:
    """The shape of the folder to go on from, under the section's attention patterns."""
    shape = load_config(given)
    return with_attention(shape, section.attention) if section.attention else shape


def make_model(shape: DecoderConfig, given: str | None, seed: int, attention: Any = None) -> Decoder:
    """Fresh weights from the seed, or those of the folder that is given, in float32."""
    if not given:
        return Decoder(shape, torch.Generator().manual_seed(seed))
    model = load_model(given, dtype="float32")
    if attention:
        set_attention(model, attention)
    return model


def masked(section: Pretrain) -> bool:
    """Whether attention stays within a document."""
    packing = TrainConfig(steps=1, **methods(section)).choice("packing")
    return bool(registry.build("packing", packing).masks_documents)


def dtype_of(recipe: Recipe) -> str:
    """What models run in unless a stage says otherwise: what the recipe pretrains in, or bf16."""
    from modicum.pipeline.stages.pretrain import Section

    section = recipe.first(Section)
    return section.dtype if section else "bf16"


def dtype_named(name: str | None, stage: str) -> str:
    """PyTorch's name of a recipe's dtype. Raises `UserError` for one that is not allowed."""
    if name not in DTYPES:
        raise UserError(f"{stage}.dtype={name!r} is not allowed; write bf16 or fp32")
    return DTYPES[name]


def torch_dtype(name: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, DTYPES[name])
    return dtype
