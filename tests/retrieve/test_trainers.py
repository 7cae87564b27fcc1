"""Trainers: losses against float64 loops, the sampler's frequencies, cuts against a model cut, pairs and scores."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch.nn import functional as F

from modicum.core.errors import UserError
from modicum.core.registry import build
from modicum.retrieve.pairs import Pairs, max_sim, read_scores, split_by_article, with_negatives, write_scores
from modicum.retrieve.student import Student, word_vectors
from modicum.retrieve.trainers import Batch
from modicum.retrieve.trainers._conformance import toy_pairs
from modicum.retrieve.trainers.tas_balanced import bins_of, in_batch_margins


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).requires_grad_()


def batch_of(pairs: Pairs, queries: list[int], negatives: list[int]) -> Batch:
    return Batch(np.array(queries), pairs.positive_Q[queries], np.array(negatives))


def three(seed: int = 0, dim: int = 6) -> tuple[torch.Tensor, ...]:
    return tuple(rand(4, dim, seed=seed + i) for i in range(3))


# in-batch -------------------------------------------------------------------------------------------------------


def test_in_batch_is_the_librarys_loss():
    pairs = toy_pairs()
    trainer = build("trainer", "in-batch:scale=7", pairs)
    q, p, n = three()
    batch = batch_of(pairs, [0, 7, 14, 21], [1, 8, 15, 22])
    loss = trainer.on_vectors(q, p, n, batch)
    cos = F.normalize(q, dim=-1) @ F.normalize(torch.cat([p, n]), dim=-1).T
    expected = np.mean([-7 * cos[i, i].item() + np.log(np.exp(7 * cos[i].detach().numpy()).sum()) for i in range(4)])
    assert np.isclose(loss.item(), expected, atol=1e-12)
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    library = losses.MultipleNegativesRankingLoss(None, scale=7.0)
    assert np.isclose(loss.item(), library.compute_loss_from_embeddings([q, p, n], None).item(), atol=1e-9)


def test_a_passage_of_its_own_is_no_negative_of_a_query():
    pairs = replace(toy_pairs(), positive_Q=np.array([0, 0, *range(2, 36)]))
    trainer = build("trainer", "in-batch", pairs)
    q, p, n = three()
    p = torch.cat([p[:1], p[:1], p[2:]])
    loss = trainer.on_vectors(q, p, n, batch_of(pairs, [0, 1, 14, 21], [5, 8, 15, 0]))
    logits = 20 * F.normalize(q, dim=-1) @ F.normalize(torch.cat([p, n]), dim=-1).T
    logits[0, 1] = logits[1, 0] = logits[0, 7] = logits[1, 7] = -torch.inf
    assert torch.isclose(loss, F.cross_entropy(logits, torch.arange(4)))


# margin-mse -----------------------------------------------------------------------------------------------------


def test_margin_mse_and_its_gradient_are_the_formula():
    pairs = toy_pairs()
    trainer = build("trainer", "margin-mse:teacher_scale=1.5", pairs)
    q, p, n = three()
    negatives = [int(pairs.negatives_Q[i][2]) for i in (3, 9, 20, 30)]
    batch = batch_of(pairs, [3, 9, 20, 30], negatives)
    trainer.on_vectors(q, p, n, batch).backward()
    taught = [
        1.5 * (pairs.scores_Q[i][i] - pairs.scores_Q[i][r]) for i, r in zip((3, 9, 20, 30), negatives, strict=True)
    ]
    errors = [(q[i] @ (p[i] - n[i])).item() / 6**0.5 - taught[i] for i in range(4)]
    assert np.isclose(trainer.on_vectors(q, p, n, batch).item(), np.mean(np.square(errors)), atol=1e-12)
    for i in range(4):
        expected = 2 / 4 * errors[i] * (p[i] - n[i]).detach() / 6**0.5
        assert torch.allclose(q.grad[i], expected, atol=1e-12)


def test_only_margins_of_one_query_enter_and_their_scale_does():
    pairs = toy_pairs()
    negatives = [int(pairs.negatives_Q[i][0]) for i in range(4)]
    batch, vectors = batch_of(pairs, [0, 1, 2, 3], negatives), three()

    def loss(change) -> float:
        scores = [{r: change(q, s) for r, s in scores.items()} for q, scores in enumerate(pairs.scores_Q)]
        return build("trainer", "margin-mse", replace(pairs, scores_Q=scores)).on_vectors(*vectors, batch).item()

    assert np.isclose(loss(lambda q, s: s), loss(lambda q, s: s + 10 * q)), "an offset of a query says nothing"
    assert not np.isclose(loss(lambda q, s: s), loss(lambda q, s: 2 * s)), (
        "the scale does (a rank loss would not see it)"
    )
    trainer = build("trainer", "margin-mse", pairs)
    q, p, n = (v.detach() for v in vectors)
    wanted = torch.from_numpy(trainer.margins(batch)) * 6**0.5
    p = n + wanted[:, None] * q / (q * q).sum(-1, keepdim=True)
    far = 5 * F.normalize(rand(4, 6, seed=9).detach(), dim=-1)
    far -= (far * q).sum(-1, keepdim=True) * q / (q * q).sum(-1, keepdim=True)
    assert trainer.on_vectors(q, p, n, batch) < 1e-12 and trainer.on_vectors(q, p + far, n + far, batch) < 1e-12


def test_margins_of_cosines():
    pairs = toy_pairs()
    q, p, n = (v.detach() for v in three())
    batch = batch_of(pairs, [0, 1, 2, 3], [int(pairs.negatives_Q[i][0]) for i in range(4)])
    trainer = build("trainer", "margin-mse:cosine=20", pairs)
    cosine = lambda a, b: (F.normalize(a, dim=-1) * F.normalize(b, dim=-1)).sum(-1)  # noqa: E731
    expected = (20 * (cosine(q, p) - cosine(q, n)) - torch.from_numpy(trainer.margins(batch))).pow(2).mean()
    assert torch.isclose(trainer.on_vectors(q, p, n, batch), expected) and trainer.unit
    assert not build("trainer", "margin-mse", pairs).unit


def test_a_negative_the_teacher_prefers_stays_negative():
    pairs = toy_pairs()
    scores = [dict(s) for s in pairs.scores_Q]
    negative = int(pairs.negatives_Q[0][0])
    scores[0][negative] = scores[0][0] + 4
    trainer = build("trainer", "margin-mse", replace(pairs, scores_Q=scores))
    assert np.isclose(trainer.margins(batch_of(pairs, [0], [negative]))[0], -4)
    del scores[0][negative]
    with pytest.raises(UserError, match="no teacher score"):
        build("trainer", "margin-mse", replace(pairs, scores_Q=scores))


# tas-balanced ---------------------------------------------------------------------------------------------------


def scored(margins: list[list[float]]) -> Pairs:
    """Query q has passage 0 with score 0 and negatives 1, 2, ... with minus its margins."""
    count = max(map(len, margins)) + 1
    return Pairs(
        [f"q{i}" for i in range(len(margins))],
        [f"p{i}" for i in range(count)],
        np.zeros(len(margins), np.int64),
        [np.arange(1, len(m) + 1) for m in margins],
        [{0: 0.0} | {i + 1: -m for i, m in enumerate(row)} for row in margins],
        late=lambda q, p: np.zeros((len(q), len(p))),
    )


def test_bins_have_equal_widths():
    assert bins_of(np.array([0.0, 0.9, 1.0, 9.9, 10.0]), 10).tolist() == [0, 0, 1, 9, 9]
    assert bins_of(np.array([0.0, 0.1, 0.2, 10.0]), 10).tolist() == [0, 0, 0, 9]  # quantiles would part the first three
    assert bins_of(np.array([3.0, 3.0]), 10).tolist() == [0, 0]


def test_the_sampler_draws_clusters_and_bins_uniformly():
    """Three clusters of 1, 3 and 8 queries, batches of one: 1/3 each; then 1/2 for a bin, whatever is in it."""
    pairs = scored([[0.0, 0.2, 0.3, 0.4, 10.0]] * 12)
    trainer = build("trainer", "tas-balanced", pairs)
    trainer.clusters = [np.array([0]), np.arange(1, 4), np.arange(4, 12)]
    batches = [trainer.batch(step, 1, 0) for step in range(3000)]
    queries = np.bincount([b.query_B[0] for b in batches], minlength=12)
    expected = 3000 * np.array([1 / 3] + [1 / 9] * 3 + [1 / 24] * 8)
    assert chisquare(queries, expected).pvalue > 1e-3
    negatives = np.bincount([b.negative_B[0] for b in batches], minlength=6)[1:]
    assert chisquare(negatives, 3000 * np.array([1 / 8] * 4 + [1 / 2])).pvalue > 1e-3
    by_size = 3000 * np.full(12, 1 / 12)  # clusters drawn by their size
    assert chisquare(queries, by_size).pvalue < 1e-6


def test_batches_are_of_one_cluster_until_it_is_used_up():
    trainer = build("trainer", "tas-balanced", scored([[0.0, 1.0]] * 12))
    trainer.clusters = [np.arange(4), np.arange(4, 12)]
    cluster_of = np.array([0] * 4 + [1] * 8)
    for step in range(50):
        chosen = cluster_of[trainer.batch(step, 6, 0).query_B]
        assert len(set(chosen.tolist())) == 1 or ((chosen[:4] == 0).all() and (chosen[4:] == 1).all())
        assert len(set(trainer.batch(step, 6, 0).query_B.tolist())) == 6
    single = build("trainer", "tas-balanced", scored([[1.0], [0.0, 1.0]]))
    assert single.clusters[0].tolist() == [1], "a query with one pair is left out"


def test_topics_become_clusters():
    pairs = toy_pairs()
    student = Student.new([*pairs.queries, *pairs.passages], width=16, layers=2, heads=2, vocabulary=330)
    trainer = build("trainer", "tas-balanced:queries_per_cluster=6", pairs)
    trainer.prepare(student)
    nouns = [{q // 6 for q in c.tolist()} for c in trainer.clusters]
    assert sum(len(n) for n in nouns) == 6, "queries about one noun stay together"
    assert 4 <= len(trainer.clusters) <= 6 and sorted(np.concatenate(trainer.clusters).tolist()) == list(range(36))


def test_the_in_batch_term_is_the_double_loop_without_its_diagonal():
    scores, taught = rand(4, 8), rand(4, 8, seed=1)
    total = 0.0
    for block in (0, 4):
        errors = [
            ((scores[i, i] - scores[i, block + j]) - (taught[i, i] - taught[i, block + j])) ** 2
            for i in range(4)
            for j in range(4)
            if i != j
        ]
        total += 0.5 * sum(e.item() for e in errors) / 12
    assert np.isclose(in_batch_margins(scores, taught).item(), total, atol=1e-12)
    shifted = scores + torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    assert np.isclose(in_batch_margins(shifted, taught).item(), total), "an offset of a query says nothing"


def test_both_teachers_add_up_with_their_weights():
    pairs = toy_pairs()
    batch = batch_of(pairs, [0, 1, 2, 3], [int(pairs.negatives_Q[i][0]) for i in range(4)])
    vectors = three()
    pair = build("trainer", "margin-mse", pairs).on_vectors(*vectors, batch)
    both = build("trainer", "tas-balanced:late_scale=2", pairs).on_vectors(*vectors, batch)
    rows = np.concatenate([batch.positive_B, batch.negative_B])
    scores = vectors[0] @ torch.cat(vectors[1:]).T / 6**0.5
    term = in_batch_margins(scores, 2 * torch.from_numpy(pairs.late(batch.query_B, rows)))
    assert torch.isclose(both, pair + 0.75 * term)


# 2dmse ----------------------------------------------------------------------------------------------------------


def small_student(layers: int = 3) -> Student:
    pairs = toy_pairs()
    return Student.new([*pairs.queries, *pairs.passages], width=16, layers=layers, heads=2, vocabulary=330)


def cut(student: Student, layers: int) -> Student:
    import copy

    shallow = copy.deepcopy(student)
    del shallow.model.encoder.layer[layers:]
    shallow.model.config.num_hidden_layers = layers
    return shallow


@pytest.mark.parametrize("base", ["in-batch", "margin-mse"])
def test_2dmse_is_the_loss_of_a_model_that_was_cut_and_run_again(base):
    pairs, student = toy_pairs(), small_student()
    trainer = build("trainer", f"2dmse:base={base},dims=[4,8],weight=0.7,tau=0.5", pairs)
    plain = build("trainer", base, pairs)
    seen = set()
    for step in range(16):
        batch = trainer.batch(step, 5, 0)
        n, d = trainer.draw(3, 16, batch)
        seen.add((n, d))
        last = student(trainer.texts(batch)).pooled()
        shallow = cut(student, n)(trainer.texts(batch)).pooled()
        assert not torch.allclose(last, shallow)
        part = lambda v, batch=batch: plain.on_vectors(v[:5], v[5:10], v[10:], batch)  # noqa: E731
        target = torch.softmax(last / 0.5, -1)
        divergence = (target * (target.log() - torch.log_softmax(shallow / 0.5, -1))).sum(-1).mean()
        expected = part(last) + part(last[:, :d]) + part(shallow) + part(shallow[:, :d]) + 0.7 * divergence
        assert torch.allclose(trainer.loss(student, batch), expected, rtol=1e-5)
    assert {n for n, _ in seen} == {1, 2} and {d for _, d in seen} == {4, 8}, "every step draws, the last layer never"


def test_the_divergence_does_not_move_its_target():
    """Its gradient reaches the layers up to n only."""
    pairs, student = toy_pairs(), small_student(2)
    trainer = build("trainer", "2dmse:dims=[4],weight=1000000", pairs)
    batch = trainer.batch(0, 5, 0)
    trainer.loss(student, batch).backward()
    ratio = student.model.encoder.layer[1].output.dense.weight.grad.norm()
    below = student.model.encoder.layer[0].output.dense.weight.grad.norm()
    assert ratio < 1e-2 * below


def test_matryoshka_alone_is_another_loss():
    pairs, student = toy_pairs(), small_student()
    both = build("trainer", "2dmse:dims=[4]", pairs)
    alone = build("trainer", "2dmse:dims=[4],layers=false", pairs)
    batch = both.batch(0, 5, 0)
    assert both.loss(student, batch) > alone.loss(student, batch) + 0.5
    with pytest.raises(UserError, match="cuts layers"):
        both.loss(small_student(1), batch)


# pairs and the raw encoder --------------------------------------------------------------------------------------


def test_negatives_leave_out_the_positive_and_its_equals():
    passages = ["a cat sat", "a cat sat", "a cat ran", "dogs bark"]
    pairs = Pairs(["cat sat"], passages, np.array([1]))
    from modicum.retrieve.bm25 import BM25

    made = with_negatives(pairs, BM25.build(passages).search, 5)
    assert made.negatives_Q[0].tolist() == [2]
    lonely = with_negatives(Pairs(["bark"], passages, np.array([3])), BM25.build(passages).search, 5)
    assert lonely.negatives_Q[0].tolist() == [0]


def test_articles_stay_on_one_side():
    titles = [f"t{i % 10}" for i in range(200)]
    test = split_by_article(titles, 0.3)
    assert len({t for t, x in zip(titles, test, strict=True) if x}) == 3
    assert not {t for t, x in zip(titles, test, strict=True) if x} & {
        t for t, x in zip(titles, test, strict=True) if not x
    }
    assert np.array_equal(split_by_article(titles[::-1], 0.3)[::-1], test), "whatever the order"
    with pytest.raises(UserError, match="title"):
        split_by_article(["one"] * 5, 0.5)


def test_scores_of_several_teachers_are_averaged(tmp_path):
    pairs = toy_pairs()
    write_scores(tmp_path / "a.parquet", pairs, "a")
    doubled = replace(pairs, scores_Q=[{r: 3 * s for r, s in scores.items()} for scores in pairs.scores_Q])
    write_scores(tmp_path / "b.parquet", doubled, "b")
    both = read_scores([tmp_path / "a.parquet", tmp_path / "b.parquet"], replace(pairs, scores_Q=()))
    for mean, one in zip(both.scores_Q, pairs.scores_Q, strict=True):
        assert mean.keys() == one.keys() and all(np.isclose(mean[r], 2 * one[r]) for r in one)


def test_max_sim_is_the_loop():
    rng = np.random.default_rng(0)
    query, docs = rng.standard_normal((5, 7)), [rng.standard_normal((n, 7)) for n in (3, 1, 9)]
    expected = [sum(max(q @ d for d in doc) for q in query) for doc in docs]
    assert np.allclose(max_sim(query, docs), expected, atol=1e-5)
    assert max_sim(query, []).shape == (0,)
    with pytest.raises(UserError, match="without tokens"):
        max_sim(query, [docs[0], np.empty((0, 7))])


def test_word_vectors_put_words_of_like_company_together():
    """Tokens 0 and 1 stand beside 2 and 3, tokens 4 and 5 beside 6 and 7; 8 never occurs."""
    rng = np.random.default_rng(0)
    rows = [
        [int(rng.choice(group[0])), int(rng.choice(group[1]))] for group in [((0, 1), (2, 3)), ((4, 5), (6, 7))] * 200
    ]
    vectors = word_vectors(rows, 9, 3, 0)
    cosine = lambda a, b: vectors[a] @ vectors[b] / np.linalg.norm(vectors[a]) / np.linalg.norm(vectors[b])  # noqa: E731
    assert cosine(0, 1) > 0.9 > 0.3 > cosine(0, 5) and not vectors[8].any()


def test_a_student_knows_whole_words_and_survives_saving(tmp_path):
    student = small_student()
    states = student(["Merge the merges, merge!", "lock"])
    words = states.words_NT[0].tolist()
    tokens = student.tokenizer.convert_ids_to_tokens(student.tokenizer("Merge the merges, merge!")["input_ids"])
    assert words[0] == -1 and words[len(tokens) - 1] == -1, "special tokens are no words"
    assert states.mask_NT[1].sum() < states.mask_NT[0].sum() and (states.words_NT[1][~states.mask_NT[1]] == -1).all()
    at = [i for i, t in enumerate(tokens) if t.endswith("merge")]
    assert len({words[i] for i in (at[0], at[-1])}) == 1, "both occurrences are one word"
    student.save(tmp_path / "s")
    again = Student.open(tmp_path / "s")
    assert again.max_tokens == student.max_tokens and np.array_equal(
        again.encode(["lock a file"]), student.encode(["lock a file"])
    )
