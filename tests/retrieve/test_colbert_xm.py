"""colbert-xm: adapters by text, what stays bit for bit, MaxSim by loops, a language that is added later."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from modicum.core.errors import UserError
from modicum.core.registry import build
from modicum.retrieve import languages
from modicum.retrieve.encoders import make_encoder
from modicum.retrieve.languages import LanguageAdapters, LateHead, detect, max_sims
from modicum.retrieve.student import Student
from modicum.retrieve.trainers._conformance import toy_pairs
from modicum.retrieve.training import Training, train

ENGLISH = ["open one socket", "lock a thread and close the file, then merge!"]
GREEK = ["άνοιξε το αρχείο", "κλείσε την ουρά και το νήμα"]


def student(layers: int = 2) -> Student:
    pairs = toy_pairs(False)
    texts = [*pairs.queries, *pairs.passages, *GREEK * 5]
    return Student.new(texts, width=16, layers=layers, heads=2, vocabulary=360, max_tokens=48)


def bent(made: Student, names=("en", "el"), size: float = 0.3, seed: int = 1) -> LanguageAdapters:
    """Attached adapters that do something."""
    adapters = LanguageAdapters(made.width, made.depth, 4, names)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapters.parameters():
            p.copy_(size * torch.randn(p.shape, generator=generator))
    adapters.attach(made.model)
    return adapters


def pooled(made: Student, adapters: LanguageAdapters, texts: list[str], spoken: list[str]) -> torch.Tensor:
    with torch.no_grad(), adapters.speaking(spoken):
        return made(texts).pooled()


def test_fresh_adapters_are_the_plain_encoder_and_each_text_has_its_own():
    made = student()
    plain = torch.from_numpy(made.encode(ENGLISH))
    fresh = LanguageAdapters(16, 2, 4, ["en", "el"])
    fresh.attach(made.model)
    assert torch.equal(pooled(made, fresh, ENGLISH, ["en", "el"]), plain)
    other = student()
    adapters = bent(other)
    en, el = (pooled(other, adapters, ENGLISH, [lang] * 2) for lang in ("en", "el"))
    assert not torch.allclose(en, el, atol=1e-2)
    mixed = pooled(other, adapters, ENGLISH, ["el", "en"])
    assert torch.allclose(mixed[0], el[0], atol=1e-5) and torch.allclose(mixed[1], en[1], atol=1e-5)
    with pytest.raises(UserError, match="language"):
        pooled(other, adapters, ENGLISH, ["en", "xx"])
    with pytest.raises(UserError, match="already"):
        adapters.add("en")


def test_an_adapter_follows_the_feed_forward_network():
    made = student(1)
    seen = []
    made.model.encoder.layer[0].output.register_forward_hook(lambda _m, _i, out: seen.append(out))
    adapters = bent(made)
    made.model.encoder.layer[0].output.register_forward_hook(lambda _m, _i, out: seen.append(out))
    pooled(made, adapters, ENGLISH, ["el", "en"])
    b = adapters.of["el"][0]
    expected = F.gelu(seen[0][0] @ b.down.weight.T + b.down.bias) @ b.up.weight.T + b.up.bias
    assert torch.allclose(seen[1][0], seen[0][0] + expected, atol=1e-6)


def test_max_sim_is_the_loop():
    rng = np.random.default_rng(0)
    q, p = (torch.from_numpy(rng.standard_normal(s)) for s in ((2, 4, 5), (3, 6, 5)))
    qm, pm = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]).bool(), torch.from_numpy(rng.random((3, 6)) < 0.6)
    pm[:, 0] = True
    for b in range(2):
        for j in range(3):
            expected = sum(max(q[b, t] @ p[j, s] for s in range(6) if pm[j, s]) for t in range(4) if qm[b, t])
            assert max_sims(q, qm, p, pm)[b, j].item() == pytest.approx(float(expected), abs=1e-10)


def test_queries_are_filled_with_masks_and_documents_lose_punctuation():
    made = student()
    head = LateHead(16, 8, 20)
    seen = []
    hook = made.model.embeddings.register_forward_hook(
        lambda _m, _a, k, _o: seen.append(k["input_ids"]), with_kwargs=True
    )
    q, q_mask = head(made, ENGLISH, query=True)
    d, d_mask = head(made, ENGLISH, query=False)
    hook.remove()
    assert q.shape == (2, 20, 8) and q_mask.all() and (seen[0][0][10:] == made.tokenizer.mask_token_id).all()
    dropped = made.tokenizer.convert_ids_to_tokens(seen[1][1][~d_mask[1]].tolist())
    assert sorted(t.strip("Ġ") for t in dropped) == ["!", ","]
    assert torch.allclose(d.norm(dim=-1), torch.ones(d.shape[:2]), atol=1e-5)
    # What fills a query attends: without it the first token's vector is another.
    short, _ = LateHead(16, 8, 12)(made, ENGLISH[:1], query=True)
    assert short.shape[1] == 12


def test_the_loss_is_pairwise_and_in_batch():
    trainer = build("trainer", "colbert-xm:scale=2", toy_pairs())
    s = torch.from_numpy(np.random.default_rng(0).standard_normal((3, 6)))
    batch = trainer.drawn([0, 7, 14], [1, 8, 15], 0, 0)
    e = np.exp(2 * s.numpy())
    pair = np.mean([-np.log(e[i, i] / (e[i, i] + e[i, 3 + i])) for i in range(3)])
    every = np.mean([-np.log(e[i, i] / e[i].sum()) for i in range(3)])
    assert trainer.on_scores(s, batch).item() == pytest.approx(pair + every, abs=1e-10)


def test_training_changes_what_is_in_common_and_no_language(tmp_path):
    pairs = toy_pairs()
    made = student()
    adapters = bent(made, size=0.1)
    languages.pretrain(made, adapters, {"en": pairs.passages, "el": GREEK * 8}, steps=3)
    languages.save(tmp_path / "m", made, adapters)
    again = Student.open(tmp_path / "m" / languages.BASE)
    before, words = copy.deepcopy(adapters.state_dict()), again.model.embeddings.word_embeddings.weight.clone()
    shared = again.model.encoder.layer[1].output.dense.weight.clone()
    knobs = {"adapters": str(tmp_path / "m"), "dims": 16, "query_tokens": 12, "scale": 5}
    trainer = build("trainer", {"method": "colbert-xm", **knobs}, pairs)
    train(again, trainer, Training(steps=120, batch=12, lr=5e-3), out=tmp_path / "t")
    assert all(torch.equal(p, before[n]) for n, p in trainer.adapters.state_dict().items())
    assert torch.equal(again.model.embeddings.word_embeddings.weight, words)
    assert not torch.equal(again.model.encoder.layer[1].output.dense.weight, shared)
    store = build("retriever", f"colbert-xm:model={tmp_path}/t")
    store.build([*pairs.passages, *GREEK])
    right = np.mean(store.rank(pairs.queries, 3).ids_QK == np.arange(36)[:, None]) * 3
    assert right > 0.4 and store.encoder.adapters.languages == ["en", "el"]
    spoken = build("retriever", f"colbert-xm:model={tmp_path}/t,language=el")
    spoken.build(pairs.passages[:4])
    assert not np.allclose(store.encoder.tokens(ENGLISH)[0], spoken.encoder.tokens(ENGLISH)[0], atol=1e-4)
    encoder = make_encoder(f"sentence-transformers:model={tmp_path}/t,unit=false")
    expected = pooled(again, trainer.adapters, [ENGLISH[1], GREEK[0]], ["en", "el"])
    assert np.allclose(encoder.encode([ENGLISH[1], GREEK[0]]), expected.numpy(), atol=1e-4), "detected, text by text"


def test_a_language_added_later_leaves_the_others_bit_for_bit():
    made = student()
    adapters = bent(made, ("en",))
    before = copy.deepcopy(made.state_dict()), copy.deepcopy(adapters.state_dict())
    english = pooled(made, adapters, ENGLISH, ["en"] * 2)
    losses = languages.learn_language(made, adapters, "el", GREEK * 8, steps=40, lr=1e-2)
    assert all(torch.equal(p, before[0][n]) for n, p in made.state_dict().items())
    assert all(torch.equal(p, before[1][n]) for n, p in adapters.state_dict().items() if ".el." not in n)
    assert torch.equal(pooled(made, adapters, ENGLISH, ["en"] * 2), english)
    assert adapters.of["el"][0].up.weight.any() and np.mean(losses[-5:]) < np.mean(losses[:5])


def test_languages_are_detected_by_script_and_by_words():
    known = ["en", "de", "fr", "el", "ru", "zh"]
    texts = {
        "the file is in the queue": "en", "die Datei ist in der Reihe und nicht hier": "de",
        "le fichier est dans la file": "fr", GREEK[0]: "el", "где находится файл": "ru", "文件在哪里": "zh",
        "???": "en", "zzz": "en",
    }  # fmt: skip
    assert {t: detect(t, known) for t in texts} == texts
    assert detect(GREEK[0], ["en", "de"]) == "en", "only languages that there are"
