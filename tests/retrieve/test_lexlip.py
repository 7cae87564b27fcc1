"""lexlip: both read-outs and the sparsity term against float64 loops, the bottleneck's gradient, the inverted index."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from modicum.core.errors import UserError
from modicum.core.registry import build
from modicum.retrieve.lexical import LexicalHeads, flops
from modicum.retrieve.retrievers.lexlip import LexLipStore, largest
from modicum.retrieve.student import Student
from modicum.retrieve.trainers._conformance import toy_pairs
from modicum.retrieve.trainers._masking import embedding
from modicum.retrieve.training import Training, train


def made() -> tuple[Student, LexicalHeads]:
    pairs = toy_pairs(False)
    student = Student.new([*pairs.queries, *pairs.passages], width=16, layers=1, heads=2, vocabulary=330)
    torch.manual_seed(1)
    return student, LexicalHeads(student, 2)


def test_both_readouts_are_the_loops():
    student, heads = made()
    texts = ["open one socket", "lock a thread with the thread, then close the file"]
    states = student(texts)
    h, mask = states.layers[-1].double(), states.mask_NT
    heads.double()
    student.double()
    logits = heads.masked(h, embedding(student))
    v, b = heads.weights(student, h, mask), heads.bottleneck(student, h, mask)
    for n in range(2):
        real = logits[n][mask[n]]
        best = torch.tensor([max(real[t, w].item() for t in range(len(real))) for w in range(real.shape[1])])
        raw = torch.log(1 + best.clamp(min=0).double())
        assert torch.allclose(v[n], raw / raw.norm(), atol=1e-6)
        p = torch.exp(best.double()) / torch.exp(best.double()).sum()
        assert torch.allclose(b[n], p @ embedding(student), atol=1e-6)
    # Padding never wins: the same text alone, without padding, has the same weights.
    alone = student.float()(texts[:1])
    heads.float()
    assert torch.allclose(heads.weights(student, alone.layers[-1], alone.mask_NT)[0], v[0].float(), atol=1e-4)


def test_the_bottleneck_gives_no_gradient_to_the_word_embeddings_through_its_product():
    student, heads = made()
    states = student(["open one socket"])
    h = states.layers[-1].detach().requires_grad_()
    b = heads.bottleneck(student, h, states.mask_NT)
    E = embedding(student)
    p = heads.logits(student, h, states.mask_NT).softmax(-1)
    direct = torch.autograd.grad((p.detach() @ E).sum(), E)[0]
    assert direct.abs().max() > 0
    through = torch.autograd.grad(b.sum(), E, retain_graph=True)[0]
    logits_alone = torch.autograd.grad((p @ E.detach()).sum(), E)[0]
    assert torch.allclose(through, logits_alone), "only the logits' own use of E is left"
    assert torch.autograd.grad(b.sum(), h)[0].abs().max() > 0, "p is trained"


def test_flops_of_normalised_weights_is_the_loop():
    rng = np.random.default_rng(0)
    v = np.abs(rng.standard_normal((3, 5)))
    expected = sum(np.mean(v[:, j]) ** 2 for j in range(5))
    assert flops(torch.from_numpy(v)).item() == pytest.approx(expected, abs=1e-12)


def test_the_retrieval_loss_is_symmetric_infonce_and_sparsity():
    pairs = toy_pairs()
    trainer = build("trainer", "lexlip:temperature=0.2,flops=0.5", pairs)
    q, p, n = (F.normalize(torch.rand(4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(i)), dim=-1)
               for i in range(3))  # fmt: skip
    batch = trainer.drawn([0, 7, 14, 21], [1, 8, 15, 22], 0, 0)
    total = 0.0
    for i in range(4):
        row = [float(q[i] @ x) / 0.2 for x in (*p, *n)]
        column = [float(q[j] @ p[i]) / 0.2 for j in range(4)]
        total += (np.log(np.exp(row).sum()) - row[i] + np.log(np.exp(column).sum()) - column[i]) / 8
    total += 0.5 * float(flops(q) + flops(torch.cat([p, n])))
    assert trainer.on_vectors(q, p, n, batch).item() == pytest.approx(total, abs=1e-10)


def test_the_modes_choose_the_losses():
    pairs = toy_pairs()
    student, _ = made()
    both, bottle, con = (build("trainer", f"lexlip:mode={m}", pairs) for m in ("both", "bottle", "con"))
    for trainer in (both, bottle, con):
        trainer.prepare(student)
    batch = both.batch(0, 5, 0)
    with torch.no_grad():
        sums = [float(t.loss(student, batch)) for t in (bottle, con, both)]
    assert sums[2] == pytest.approx(sums[0] + sums[1], rel=1e-5) and sums[0] > 2 and sums[1] > 0.1
    staged = build("trainer", "lexlip:steps=3", pairs)
    assert [staged.parts(s) for s in (0, 2, 3)] == [(True, False), (True, False), (False, True)]


def test_the_decoder_reads_the_bottleneck():
    """What is hidden from the decoder changes with b alone."""
    student, heads = made()
    inputs = student.tokenizer(["open one socket with the lock"], return_tensors="pt")
    ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
    hidden = torch.zeros_like(real)
    hidden[0, 2:5] = True
    b = torch.zeros(1, 16, requires_grad=True)
    loss = heads.rebuilt(student, b, ids, real, hidden)
    assert torch.autograd.grad(loss, b)[0].abs().max() > 0
    other = ids.clone()
    other[0, 0] = 7  # the first token itself is not read: b is in its position
    assert torch.allclose(heads.rebuilt(student, b, other, real, hidden), loss)


def test_the_inverted_index_is_the_dense_product():
    student, heads = made()
    pairs = toy_pairs(False)
    store = LexLipStore.of(student, heads)
    store.build(pairs.passages)
    hits = store.rank(pairs.queries[:4], 36)
    dense = store.encode(list(pairs.queries[:4])).toarray() @ store.encode(list(pairs.passages)).toarray().T
    for q in range(4):
        ids = hits.ids_QK[q][hits.ids_QK[q] >= 0]
        assert np.allclose(hits.scores_QK[q][: len(ids)], dense[q, ids], atol=1e-5) and len(ids) == (dense[q] > 0).sum()
        assert (np.diff(hits.scores_QK[q][: len(ids)]) <= 0).all()


def test_only_the_largest_weights_are_kept():
    from scipy import sparse

    m = sparse.csr_matrix(np.array([[0.1, 0, 0.5, 0.3], [0, 0, 0, 0], [0, 0.2, 0, 0]], np.float32))
    assert (
        largest(m, 2).toarray().tolist()
        == sparse.csr_matrix([[0, 0, 0.5, 0.3], [0] * 4, [0, 0.2, 0, 0]], dtype=np.float32).toarray().tolist()
    )
    student, heads = made()
    store = LexLipStore.of(student, heads, words=5)
    store.build(["open one socket", "lock"])
    assert (np.diff(store._weights_NV.indptr) <= 5).all()


def test_training_finds_words_and_a_wrong_folder_is_refused(tmp_path):
    pairs = toy_pairs()
    student, _ = made()
    trainer = build("trainer", "lexlip:mode=con", pairs)
    train(student, trainer, Training(steps=60, batch=12, lr=2e-3), out=tmp_path / "m")
    store = build("retriever", f"lexlip:model={tmp_path}/m")
    store.build(pairs.passages)
    right = np.mean(store.rank(pairs.queries, 1).ids_QK[:, 0] == np.arange(36))
    assert right > 0.5
    student.save(tmp_path / "plain")
    with pytest.raises(UserError, match=r"no lexlip\.json"):
        build("retriever", f"lexlip:model={tmp_path}/plain")
