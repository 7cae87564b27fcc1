"""Reference tests of ul2 and meco: corruption written out token by token, attention by perturbation, the rows."""

from __future__ import annotations

import math
import shutil
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from train_toys import VOCAB, config, corpus, decoder

from modicum.core import registry
from modicum.core.errors import UserError
from modicum.data.shards import MemoryDocuments
from modicum.data.stream import NO_LOSS, Batch, Stream
from modicum.model.config import llama_like
from modicum.model.decoder import Decoder
from modicum.train.loop import Trainer, train
from modicum.train.objectives import Step
from modicum.train.objectives.ul2 import DENOISERS, UL2, Config, PrefixAttend, plan, spread

V, S = 400, 60  # vocabulary and sentinels here: the last id is <s0>, marks R S X are 337, 338, 339


def only(kind: int, sentinels: int = S) -> UL2:
    return UL2(Config(sentinels=sentinels, rates=tuple(float(i == kind) for i in range(7))))


def counting(rows: int, length: int, documents: torch.Tensor | None = None) -> Batch:
    """Token t of row b is 10 + t, so that a token says where it stood; no marks among them."""
    tokens = 10 + torch.arange(length).repeat(rows, 1)
    return Batch(tokens, tokens + 1, documents, torch.arange(length).repeat(rows, 1))


def t5(row: list[int], taken: set[int]) -> tuple[list[int], list[int]]:
    """Inputs and targets of span corruption as arXiv:1910.10683 draws them, one token after another."""
    inputs: list[int] = []
    targets: list[int] = []
    span = -1
    for at, token in enumerate(row):
        if at not in taken:
            inputs.append(token)
            continue
        if at - 1 not in taken:
            span += 1
            inputs.append(V - 1 - span)
            targets.append(V - 1 - span)
        targets.append(token)
    return inputs, [*targets, V - 2 - span]


@pytest.mark.parametrize("kind", [0, 1, 3, 4, 5, 6])
@pytest.mark.parametrize("length", [6, 33, 128, 300])
def test_spans_are_taken_out_as_t5_does(kind, length):
    mode, mu, rate = DENOISERS[kind]
    made = only(kind).corrupt(counting(9, length), V, Step(index=kind, seed=length))
    sizes = plan(mu, rate, length)
    for tokens, labels, prefix in zip(made.tokens_BT.tolist(), made.targets_BT.tolist(), made.prefix_B, strict=True):
        assert tokens[0] == V - S - 3 + "RSX".index(mode)
        answers = [t for t in labels if t != NO_LOSS]
        taken = {t - 10 for t in answers if t < 10 + length}
        first = min(t for t in tokens[1:] if 10 <= t < 10 + length) - 10
        inputs, targets = t5([10 + first + i for i in range(sizes.length)], {t - first for t in taken})
        whole = [tokens[0], *inputs, *targets]
        assert int(prefix) == 1 + len(inputs)
        assert tokens == (whole + [0] * 3)[:length]
        assert labels[len(inputs) : len(whole) - 1] == targets
        assert answers == targets, "nothing else is learnt"
        assert len(taken) == sizes.noise and len(targets) == sizes.noise + sizes.spans + 1
        assert length + 1 - len(whole) <= 3, "the row is as full as it can be"


def test_sizes_are_the_papers():
    for (_, mu, rate), sizes in zip(DENOISERS, only(0, 100).plans(512), strict=True):
        if mu == 0:
            assert sizes.length == 512
            continue
        assert sizes.noise / sizes.length == pytest.approx(rate, abs=0.002)
        assert sizes.noise / sizes.spans == pytest.approx(min(mu, sizes.noise), rel=0.2)
        assert 509 <= sizes.length + 2 * sizes.spans + 1 <= 512


def test_the_sequential_denoiser_takes_a_quarter_of_the_end():
    made = only(2).corrupt(counting(4000, 40), V, Step())
    assert (made.tokens_BT[:, 0] == V - S - 2).all()
    assert (made.tokens_BT[:, 1:] == 10 + torch.arange(39)).all()
    lengths = (made.targets_BT != NO_LOSS).sum(1)
    assert lengths.min() == 1 and lengths.max() == 19 and lengths.double().mean() == pytest.approx(10, abs=0.3)
    assert (made.prefix_B == 41 - lengths).all()
    for row, n in zip(made.targets_BT[:20].tolist(), lengths[:20].tolist(), strict=True):
        assert row[-n:] == [50 - n + i for i in range(n)] and set(row[:-n]) <= {NO_LOSS}


def test_span_lengths_are_uniform_over_all_ways_to_cut():
    """5 taken out in 2 spans among 4 kept: 4 ways to cut the spans, times 3 to cut what is kept in three parts."""
    n = 6000
    generator = torch.Generator().manual_seed(0)
    draws = [torch.rand(n, 12, generator=generator) for _ in range(2)]
    masks = spread(torch.full((n,), 5), torch.full((n,), 4), torch.full((n,), 2), *draws)
    assert (masks.sum(1) == 5).all() and not masks[:, 0].any() and not masks[:, 8:].any()
    counts = Counter("".join(str(int(x)) for x in row[:9]) for row in masks)
    assert len(counts) == 12
    assert all(abs(c / n - 1 / 12) < 5 * math.sqrt(1 / 12 / n) for c in counts.values())


def test_denoisers_are_drawn_by_their_rates_and_by_the_step_alone():
    rates = (1.0, 1.0, 2.0, 1.0, 1.0, 1.0, 3.0)
    objective = UL2(Config(sentinels=S, rates=rates))
    made = objective.corrupt(counting(5000, 60), V, Step(index=4, seed=1))
    share = [(made.tokens_BT[:, 0] == V - S - 3 + k).double().mean().item() for k in range(3)]
    assert share == pytest.approx([0.2, 0.2, 0.6], abs=0.03)
    torch.manual_seed(7)
    again = objective.corrupt(counting(5000, 60), V, Step(index=4, seed=1))
    assert torch.equal(made.tokens_BT, again.tokens_BT) and torch.equal(made.targets_BT, again.targets_BT)
    for other in (Step(5, seed=1), Step(4, seed=2), Step(4, seed=1, micro=1), Step(4, seed=1, rank=1)):
        assert not torch.equal(made.tokens_BT, objective.corrupt(counting(5000, 60), V, other).tokens_BT)


def test_what_carries_no_loss_is_never_learnt():
    batch = counting(200, 48)
    batch.targets_BT[:, :20] = NO_LOSS  # a question: tokens 11 ... 30 are given
    batch.targets_BT[:, 40:] = NO_LOSS  # padding
    for kind in range(7):
        labels = only(kind).corrupt(batch, V, Step()).targets_BT
        words = set(labels[(labels < 100) & (labels != NO_LOSS)].tolist())
        assert words and words <= set(range(31, 51)), kind


def test_inputs_see_each_other_and_targets_only_what_is_before():
    model = Decoder(llama_like(V, 32, 2), torch.Generator().manual_seed(0))
    made = only(0).corrupt(counting(1, 40), V, Step())
    prefix = int(made.prefix_B[0])

    def hidden(tokens):
        return model.hidden(tokens, attend=PrefixAttend(made.prefix_B, None))

    whole = hidden(made.tokens_BT)
    for at in (0, prefix - 1, prefix, prefix + 2):
        changed = made.tokens_BT.clone()
        changed[0, at] = 5
        moved = (hidden(changed) - whole).abs().amax(-1)[0] > 1e-6
        assert moved[:at].all() if at < prefix else not moved[:at].any(), at
        assert moved[at:].all()


def test_documents_stay_apart_when_the_packing_keeps_them_apart():
    documents = (torch.arange(40)[None] >= 17).long()
    model = Decoder(llama_like(V, 32, 2), torch.Generator().manual_seed(0))
    for kind in (0, 2, 4):
        made = only(kind).corrupt(counting(1, 40, documents), V, Step(index=3))
        whole = model.hidden(made.tokens_BT, attend=PrefixAttend(made.prefix_B, made.documents_BT))
        tokens = made.tokens_BT[0]
        first = (tokens >= 10) & (tokens < 27)
        second = (tokens >= 27) & (tokens < 50)
        changed = made.tokens_BT.clone()
        changed[0, first.nonzero()[0, 0]] = 5
        moved = (model.hidden(changed, attend=PrefixAttend(made.prefix_B, made.documents_BT)) - whole).abs().amax(-1)[0]
        assert (moved[first] > 1e-6).any() and not (moved[second] > 1e-6).any()
        mode = made.tokens_BT.clone()
        mode[0, 0] = 5
        moved = (model.hidden(mode, attend=PrefixAttend(made.prefix_B, made.documents_BT)) - whole).abs().amax(-1)[0]
        assert (moved[first | second] > 1e-6).all(), "everybody reads the mode"


def test_the_loss_is_the_naive_one():
    """Every layer's attention and the cross-entropy in float64 over the row as a reader would write it."""
    model = Decoder(llama_like(V, 32, 2), torch.Generator().manual_seed(0))
    objective = UL2(Config(sentinels=S))
    batch, step = counting(5, 40), Step(index=2)
    loss = objective.loss(model, batch, step)
    made = objective.corrupt(batch, V, step)
    wide = Decoder(llama_like(V, 32, 2), torch.Generator().manual_seed(0)).double()
    total, count = 0.0, 0
    for tokens, labels, prefix in zip(made.tokens_BT, made.targets_BT, made.prefix_B.tolist(), strict=True):
        seen = torch.tensor([[j < prefix or j <= i for j in range(40)] for i in range(40)])

        def attend(layer, q, k, v, *, window, scale, softcap, seen=seen):
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
            scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~seen, -math.inf)
            return scores.softmax(-1) @ v

        logits = wide(tokens[None], positions_BT=torch.arange(40)[None], attend=attend)[0]
        for i, label in enumerate(labels.tolist()):
            if label != NO_LOSS:
                total -= float(F.log_softmax(logits[i].detach(), -1)[label])
                count += 1
    assert float(loss.count) == count
    assert float(loss.total) == pytest.approx(total, rel=1e-5)


def test_sliding_windows_hold():
    mask = PrefixAttend(torch.tensor([3]), None)._mask(torch.zeros(1, 1, 6, 4), 2)[0, 0]
    seen = [[j for j in range(6) if mask[i, j] == 0] for i in range(6)]
    assert seen == [[0, 1, 2], [0, 1, 2], [1, 2], [2, 3], [3, 4], [4, 5]]


# In runs.


def sites(reserved: int = 40) -> MemoryDocuments:
    plain = corpus()
    examples = {d: [(plain.tokens(d, i) % 40, 1) for i in range(plain.documents(d))] for d in plain.domains}
    metadata = {d: [[50, 51 + i % 3, 59] for i in range(120)] for d in plain.domains}
    return MemoryDocuments(examples, metadata=metadata, reserved=reserved)


def _stream(objective: str, total: float, reserved: int = 40) -> Stream:
    told = config(objective=objective, packing="concat:mask=true")
    return told.stream(sites(reserved), seed=3, total=total)


@pytest.mark.parametrize("objective", ["ul2:sentinels=12", "meco"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resume_is_bit_for_bit(tmp_path, objective, dtype):
    def run(folder):
        told = config(objective=objective, dtype=dtype, checkpoint_every=4, micro_batch=4, keep=9)
        return train(decoder(), _stream(objective, told.total_tokens), told, folder, label="")

    whole = run(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-00000012")
    again = run(tmp_path / "cut")
    assert again.resumed_from == 8 and again.loss == whole.loss
    files = (tmp_path / p / "checkpoints" / "step-00000012" / "model.safetensors" for p in ("whole", "cut"))
    one, two = (f.read_bytes() for f in files)
    assert one == two


def test_ul2_needs_ids_that_no_text_uses():
    told = config(objective="ul2:sentinels=12")
    with pytest.raises(UserError, match=r"needs 15 ids .* finds 14: curate with --reserved 15"):
        Trainer(decoder(), _stream("ul2", 1e4, reserved=14), told).open()
    Trainer(decoder(), _stream("ul2", 1e4, reserved=15), told).open()
    Trainer(decoder(), _stream("ul2", 1e4, reserved=0), config(objective="ul2:sentinels=12,take_last=true")).open()
    # A model's vocabulary that is longer than its tokenizer's has them too.
    stream = _stream("ul2", 1e4, reserved=0)
    stream.documents.vocab_size = VOCAB - 15
    Trainer(decoder(), stream, told).open()


@pytest.mark.parametrize(
    ("choice", "told"),
    [
        ("ul2:sentinels=1", "sentinels=1 must be at least 2"),
        ("ul2:rates=[1,1]", "must be seven numbers"),
        ("ul2:rates=[0,0,0,0,0,0,0]", "not all of them 0"),
        ("ul2:logits_bytes=0", "logits_bytes=0 must be positive"),
        ("meco:logits_bytes=0", "logits_bytes=0 must be positive"),
    ],
)
def test_knobs_out_of_range_are_refused(choice, told):
    with pytest.raises(UserError, match=f"objective/.*{told}"):
        registry.build("objective", choice)


def test_what_ul2_cannot_do_is_said():
    with pytest.raises(UserError, match=r"up to 65 sentinels in rows of 512 tokens .* give ul2:sentinels=65"):
        only(3, 64).plans(512)
    with pytest.raises(UserError, match="rows of at least 6 tokens, got 5"):
        only(0).plans(5)
    with pytest.raises(UserError, match="63 ids for its marks and the vocabulary has 60"):
        only(0).corrupt(counting(1, 40), 60, Step())
    with pytest.raises(UserError, match="needs a decoder"):
        only(0).loss(torch.nn.Linear(2, 2), counting(1, 40), Step())


def test_meco_learns_every_word_of_the_text_and_none_of_the_metadata():
    """Its loss is next-token's on rows written out by hand: start, metadata, text, end."""
    model = Decoder(llama_like(VOCAB, 32, 2), torch.Generator().manual_seed(0))
    held = MemoryDocuments({"a": [([1, 10, 11, 12, 13, 1], 1)]}, metadata={"a": [[50, 51, 59]]})
    stream = Stream(
        held, packing="concat:mask=true", sequence_length=8, transforms=["meco:cooldown=0.1"], total=80, epochs=1
    )
    loss = registry.build("objective", "meco").loss(model, stream.next_batch(1), Step())
    row = torch.tensor([[1, 50, 51, 59, 10, 11, 12, 13]])
    logp = model.double()(row).log_softmax(-1)[0]
    expected = -sum(logp[3 + i, t] for i, t in enumerate([10, 11, 12, 13, 1]))
    assert float(loss.count) == 5 and float(loss.total.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_meco_brings_its_transform_and_asks_for_documents_apart():
    assert [str(c) for c in config(objective="meco").choices("transform")] == ["meco"]
    chosen = config(objective="meco", transform="meco:cooldown=0.25").choices("transform")
    assert [str(c) for c in chosen] == ["meco:cooldown=0.25"], "a half that was chosen stays as it is"
    with pytest.raises(UserError, match=r"transform=meco, which objective 'meco' brings along.*with transform=none"):
        Trainer(decoder(), _stream("next-token", 1e4), config(objective="meco"))
    with pytest.raises(UserError, match="choose packing concat:mask=true"):
        registry.build("objective", "meco").loss(decoder(), counting(1, 8), Step())


@pytest.mark.parametrize(("objective", "dtype"), [("ul2:sentinels=30", "float32"), ("meco", "bfloat16")])
def test_the_forecast_is_near_the_bytes_that_are_really_alive(objective, dtype):
    """Two real steps with every storage counted, against the trace."""
    from modicum.budget.trace import Live
    from modicum.train.engine import TrainEngine
    from modicum.train.forecast import blank, step_cost

    length, rows, vocabulary = 96, 3, 2048
    shape = llama_like(vocabulary, 128, 2, context_length=length)
    told = config(objective=objective, dtype=dtype, sequence_length=length, batch_sequences=rows)
    traced = step_cost(lambda: blank(shape), told, vocabulary, masked=True)
    with Live() as live:
        tokens = torch.randint(400, (rows, length))
        batch = Batch(
            tokens,
            tokens.clone(),
            (torch.arange(length) > 50).long().repeat(rows, 1),
            torch.arange(length).expand(rows, length),
        )
        engine = TrainEngine(Decoder(shape), told)
        engine.bind(engine.model)
        for index in range(2):
            engine.optimizer.begin({"lr": 1.0})
            engine.gradients(batch, rows * length, Step(index, 0, told.total_tokens, 0))
            engine.norm()
            engine.update({"lr": 1.0}, 0.5)
        peak = live.peak
    assert traced.peak_bytes == pytest.approx(peak, rel=0.15)
    assert traced.flops > 0
