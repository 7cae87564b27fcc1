"""What must hold for any memory saver, on a decoder of a few thousand parameters."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from modicum.core import registry
from modicum.core.choice import Choice
from modicum.data.stream import Batch
from modicum.model.config import llama_like
from modicum.model.decoder import Decoder
from modicum.train.callback import join_state, split_state
from modicum.train.config import TrainConfig
from modicum.train.engine import TrainEngine
from modicum.train.forecast import blank, step_cost
from modicum.train.memory import MemorySaver
from modicum.train.objectives import Step

VOCABULARY, ROWS, LENGTH = 61, 4, 16
SHAPE = llama_like(VOCABULARY, 32, 2, heads=4, kv_heads=2)


def _choice(key: str) -> Choice:
    """The method with the settings of `TOY`, if it has one."""
    toy = getattr(registry.load("memory", key).module, "TOY", None)
    return Choice("memory", key, vars(toy) if toy else {})


def _config(choices: list[Choice], **knobs: Any) -> TrainConfig:
    usual: dict[str, Any] = {
        "steps": 8,
        "sequence_length": LENGTH,
        "batch_sequences": ROWS,
        "dtype": "float32",
    }
    return TrainConfig(device="cpu", memory=choices, **usual | knobs)


def _model() -> Decoder:
    return Decoder(SHAPE, torch.Generator().manual_seed(0))


def _engine(choices: list[Choice], **knobs: Any) -> TrainEngine:
    engine = TrainEngine(_model(), _config(choices, **knobs))
    engine.build()
    return engine


def _batch(seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(4, VOCABULARY, (ROWS, LENGTH + 1), generator=generator)
    targets = tokens[:, 1:].clone()
    targets[0, 5:] = -100
    documents = (torch.arange(LENGTH)[None] >= torch.arange(3, 3 + ROWS)[:, None]).long()
    return Batch(tokens[:, :-1].contiguous(), targets, documents, torch.arange(LENGTH).expand(ROWS, LENGTH).clone())


def _gradient(engine: TrainEngine, seed: int = 1) -> tuple[float, Tensor]:
    sums, _ = engine.gradients(_batch(seed), 1, Step(engine.steps_done))
    flat = torch.cat([p.grad.flatten().double() for p in engine.named.values() if p.grad is not None])
    engine.drop_gradients()
    return float(sums[0]), flat


def _saver(engine: TrainEngine) -> MemorySaver:
    saver: Any = next(part for name, part in engine.parts.items() if name.startswith("memory."))
    return saver


def check_forward_is_the_plain_one(key: str) -> None:
    """The loss is the plain step's, up to the order of floating-point sums."""
    plain, _ = _gradient(_engine([]))
    saved, _ = _gradient(_engine([_choice(key)]))
    assert abs(plain - saved) <= 1e-5 * abs(plain), f"{key}: the loss is {saved}, without it {plain}"


def check_gradient_error(key: str) -> None:
    """The whole gradient is within `gradient_error` of the plain step's (2-norm), and no more is claimed."""
    _, plain = _gradient(_engine([]))
    engine = _engine([_choice(key)])
    _, saved = _gradient(engine)
    error, allowed = float((saved - plain).norm() / plain.norm()), _saver(engine).gradient_error
    assert error <= allowed, f"{key}: the gradient's error is {error:.2g}, it claims {allowed:g}"


def check_accumulates(key: str) -> None:
    """Micro-batches add up to the gradient of the whole batch, within twice `gradient_error`."""
    engine = _engine([_choice(key)])
    _, whole = _gradient(engine)
    _, parts = _gradient(_engine([_choice(key)], micro_batch=1))
    error = float((parts - whole).norm() / whole.norm())
    assert error <= 2 * _saver(engine).gradient_error, f"{key}: the gradient's error over micro-batches is {error:.2g}"


def check_leaves_the_model_as_it_was(key: str) -> None:
    """Names and values of the state do not change, and neither does what the model computes afterwards."""
    before = _model()
    engine = _engine([_choice(key)])
    _gradient(engine)
    after = engine.model
    assert list(after.state_dict()) == list(before.state_dict()), f"{key}: the parameters' names changed"
    for name, value in before.state_dict().items():
        assert torch.equal(value, after.state_dict()[name]), f"{key}: {name} changed"
    tokens = _batch().tokens_BT
    with torch.no_grad():
        assert torch.equal(before.eval()(tokens), after.eval()(tokens)), f"{key}: the model computes something else"


def check_resumes_bit_for_bit(key: str) -> None:
    """After four steps, state stored and loaded into a new run gives the next step's gradient bit for bit."""

    def go(engine: TrainEngine, first: int, last: int) -> Tensor:
        flat = torch.zeros(0)
        for index in range(first, last):
            engine.steps_done = index
            torch.manual_seed(index)
            _, flat = _gradient(engine, seed=index)
            for part in engine.parts.values():
                part.after_step(engine)
        return flat

    straight = _engine([_choice(key)])
    wanted = go(straight, 0, 5)
    begun, resumed = _engine([_choice(key)]), _engine([_choice(key)])
    go(begun, 0, 4)
    tensors, values = split_state(_saver(begun).state_dict())
    _saver(resumed).load_state_dict(join_state(load(save({n: t.contiguous() for n, t in tensors.items()})), values))
    assert torch.equal(go(resumed, 4, 5), wanted), f"{key}: the gradient differs after resuming"


def check_draws_for_itself(key: str) -> None:
    """A saver leaves PyTorch's generator alone, so that an objective draws what it draws without it."""
    drawn = []
    for engine in (_engine([]), _engine([_choice(key)])):
        torch.manual_seed(5)
        _gradient(engine)
        drawn.append(torch.rand(1))
    assert torch.equal(*drawn), f"{key}: it draws from the generator that objectives use"


def check_without_gradients(key: str) -> None:
    """Within `around`, a forward pass without gradients gives the plain logits and keeps no state."""
    engine = _engine([_choice(key)])
    state = copy.deepcopy(_saver(engine).state_dict())
    tokens = _batch().tokens_BT
    with torch.no_grad():
        wanted = _model()(tokens)
        with _saver(engine).around(engine):
            logits = engine.model(tokens)
    assert torch.equal(logits, wanted), f"{key}: logits change where no gradient is taken"
    assert _saver(engine).state_dict().keys() == state.keys(), f"{key}: state appears where no gradient is taken"


def check_an_error_leaves_no_trace(key: str) -> None:
    """A pass that raises leaves model and loss as they were."""
    engine = _engine([_choice(key)])
    with contextlib.suppress(KeyError), _saver(engine).around(engine):
        raise KeyError
    plain, saved = _gradient(_engine([])), _gradient(engine)
    assert abs(plain[0] - saved[0]) <= 1e-5 * abs(plain[0]), f"{key}: the loss changed after an error"


def check_trace(key: str) -> None:
    """A step can be traced without data, and what is saved shows: no more bytes than the plain step's.

    On a shape where activations and logits weigh more than weights, so that a saver has something to save.
    """
    shape = llama_like(512, 32, 2, heads=4, kv_heads=2)
    peaks = [
        step_cost(lambda: blank(shape), _config(choices, batch_sequences=64), 512).peak_bytes
        for choices in ([], [_choice(key)])
    ]
    cls: Any = registry.load("memory", key).cls
    limit = 0.995 if cls.provides else 1.0
    assert peaks[1] <= limit * peaks[0], f"{key}: the traced peak is {peaks[1]:,} bytes, without it {peaks[0]:,}"


def check_names_what_it_saves(key: str) -> None:
    """All but the baseline say what they act on, in a word that they both provide and conflict with."""
    cls: Any = registry.load("memory", key).cls
    acts_on = cls.provides & cls.conflicts
    assert bool(acts_on) == (key != "none"), f"{key}: acts on {sorted(acts_on)}; name activation_memory or loss_memory"
