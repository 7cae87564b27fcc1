"""Feedback of a language model, and the losses that learn from it, against float64 loops."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from modicum.core.errors import UserError
from modicum.core.registry import build
from modicum.data.tokenizer import Tokenizer
from modicum.model.config import DecoderConfig
from modicum.model.decoder import Decoder
from modicum.retrieve.feedback import Feedback, TaskPairs, oracle, with_feedback
from modicum.retrieve.student import Student
from modicum.retrieve.trainers._conformance import toy_pairs
from modicum.retrieve.trainers.llm_embedder import instructions
from modicum.retrieve.trainers.udr import lambda_mrr, mine


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).requires_grad_()


@pytest.fixture(scope="module")
def feedback() -> Feedback:
    pairs = toy_pairs(False)
    tokenizer = Tokenizer.train([*pairs.queries, *pairs.passages], 300)
    config = DecoderConfig(
        vocab_size=tokenizer.vocab_size, width=16, layers=1, heads=2, kv_heads=1, head_dim=8, mlp_width=32,
        context_length=256,
    )  # fmt: skip
    return Feedback(Decoder(config, torch.Generator().manual_seed(0)), tokenizer)


# feedback -------------------------------------------------------------------------------------------------------


def naive(feedback: Feedback, prompt: str, target: str) -> list[float]:
    """ln p of each token of the target, one forward pass for each."""
    t = feedback.tokenizer
    ids, logs = [t.start_id, *t.encode(prompt, specials=False)], []
    for token in t.encode(target, specials=False):
        logits = feedback.model(torch.tensor([ids]))[0, -1].double()
        logs.append(float(logits.detach().log_softmax(0)[token]))
        ids.append(token)
    return logs


def test_likelihoods_are_those_of_the_targets_tokens_alone(feedback):
    prompts = ["a long passage about a queue and a parser. Question: what? Answer: ", "lock", ""]
    targets = ["the queue", "threads are locked", "merge"]
    sums, means = (feedback.log_likelihoods(prompts, targets, mean=mean) for mean in (False, True))
    for n, (prompt, target) in enumerate(zip(prompts, targets, strict=True)):
        logs = naive(feedback, prompt, target)
        assert sums[n] == pytest.approx(sum(logs), abs=1e-4) and means[n] == pytest.approx(np.mean(logs), abs=1e-4)
    p_NC = feedback.label_probabilities(prompts[:2], ["queue", "thread", "file"])
    odds = [math.exp(sum(naive(feedback, prompts[1], c))) for c in ("queue", "thread", "file")]
    assert np.allclose(p_NC[1], np.array(odds) / sum(odds), atol=1e-4) and np.allclose(p_NC.sum(1), 1)


def test_a_prompt_too_long_loses_its_beginning(feedback):
    long = "socket " * 200 + "close the file"
    ids = feedback.tokenizer.encode(long, specials=False)
    tail = feedback.tokenizer.encode("queue", specials=False)
    kept = feedback.tokenizer.decode(ids[len(ids) + len(tail) - (256 - 1) :])
    assert feedback.log_likelihoods([long], ["queue"])[0] == pytest.approx(
        feedback.log_likelihoods([kept], ["queue"])[0], abs=1e-4
    )
    with pytest.raises(UserError, match="target 1 is empty"):
        feedback.log_likelihoods(["a", "b"], ["x", " "])
    with pytest.raises(UserError, match="one target for each"):
        feedback.log_likelihoods(["a", "b"], ["x"])


def test_rewards_become_scores_and_the_oracle_reads_them(feedback):
    pairs = toy_pairs(False)
    targets = [f"{q} now" for q in pairs.queries]
    scored = with_feedback(pairs, feedback, targets)
    q, row = 3, int(pairs.negatives_Q[3][1])
    prompt = f"{pairs.passages[row]}\n\nQuestion: {pairs.queries[q]}\nAnswer: "
    assert scored.scores_Q[q][row] == pytest.approx(sum(naive(feedback, prompt, targets[q])), abs=1e-4)
    assert set(scored.scores_Q[q]) == {3, *map(int, pairs.negatives_Q[q])}
    hand = replace(pairs, queries=["a", "b"], positive_Q=np.array([0, 1]), negatives_Q=[np.array([1]), np.array([2])],
                   scores_Q=[{0: 3.0, 1: 1.0}, {1: 0.0, 2: 2.0}], articles_Q=())  # fmt: skip
    judged = oracle(hand)
    assert (judged.best, judged.random, judged.labelled, judged.above) == (2.5, 1.5, 1.5, 0.5)
    with pytest.raises(UserError, match="at least two"):
        oracle(pairs)


# llm-embedder ---------------------------------------------------------------------------------------------------


def stable(q, k, r, scale: float, contrastive: float, distil: float) -> float:
    """The loss by its definition, in plain loops."""
    B, K = r.shape
    q, k = F.normalize(q, dim=-1).detach().numpy(), F.normalize(k, dim=-1).detach().numpy()
    total = 0.0
    for b in range(B):
        logits = {(c, i): scale * float(q[b] @ k[c, i]) for c in range(B) for i in range(K)}
        ce = lambda target, out, logits=logits: (  # noqa: E731
            math.log(sum(math.exp(v) for key, v in logits.items() if key not in out)) - logits[target]
        )
        order = sorted(range(K), key=lambda i: -float(r[b, i]))
        w = np.exp(r[b].numpy() - float(r[b].max()))
        w /= w.sum()
        total += distil * sum(w[i] * ce((b, i), {(b, j) for j in order[:n]}) for n, i in enumerate(order)) / B
        total += contrastive * ce((b, 0), set()) / B
    return total


def test_every_candidate_is_the_positive_without_those_above_it():
    trainer = build("trainer", "llm-embedder:scale=7,contrastive=0.3,distil=0.8", toy_pairs())
    q, k = rand(2, 5), rand(2, 3, 5, seed=1)
    rewards = torch.tensor([[-2.0, -1.0, -3.0], [-1.0, -5.0, -0.5]], dtype=torch.float64)
    loss = trainer.on_candidates(q, k, rewards)
    assert loss.item() == pytest.approx(stable(q, k, rewards, 7, 0.3, 0.8), abs=1e-10)
    permuted = trainer.on_candidates(q, k[:, [0, 2, 1]], rewards[:, [0, 2, 1]])
    assert permuted.item() == pytest.approx(loss.item(), abs=1e-10), "the order of candidates says nothing"


def test_equal_rewards_and_one_infinite_reward():
    trainer = build("trainer", "llm-embedder:scale=7,contrastive=0", toy_pairs())
    q, k = rand(2, 5), rand(2, 3, 5, seed=1)
    equal = torch.zeros(2, 3, dtype=torch.float64)
    assert trainer.on_candidates(q, k, equal).item() == pytest.approx(stable(q, k, equal, 7, 0, 1), abs=1e-10)
    one = torch.tensor([[0.0, 900.0, 0.0], [900.0, 0.0, 0.0]], dtype=torch.float64)
    logits = 7 * F.normalize(q, dim=-1) @ F.normalize(k.flatten(0, 1), dim=-1).T
    assert torch.isclose(trainer.on_candidates(q, k, one), F.cross_entropy(logits, torch.tensor([1, 3])))


def test_a_better_candidate_is_no_negative_of_a_worse_one():
    """With all weight on the worst, the better ones of its query get no gradient; those of other queries do."""
    trainer = build("trainer", "llm-embedder:scale=7,contrastive=0", toy_pairs())
    k = rand(2, 2, 5, seed=1)
    rewards = torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    q = rand(2, 5)
    both = torch.autograd.grad(trainer.on_candidates(q, k, rewards), k)[0]
    w = rewards.softmax(1)
    logits = 7 * F.normalize(q, dim=-1) @ F.normalize(k.flatten(0, 1), dim=-1).T
    first = F.cross_entropy(logits, torch.tensor([0, 2]), reduction="none")
    hidden = logits.clone()
    hidden[0, 0] = hidden[1, 2] = -torch.inf
    second = F.cross_entropy(hidden, torch.tensor([1, 3]), reduction="none")
    expected = torch.autograd.grad((w[:, 0] * first + w[:, 1] * second).mean(), k)[0]
    assert torch.allclose(both, expected, atol=1e-10)


def test_missing_candidates_take_no_part():
    for key in ("llm-embedder:scale=7", "udr", "m2-bert"):
        trainer = build("trainer", key, toy_pairs())
        q, k = rand(2, 5), rand(2, 3, 5, seed=1)
        rewards = torch.tensor([[1.0, 0.0, -torch.inf], [1.0, 0.0, -torch.inf]], dtype=torch.float64)
        padded, cut = trainer.on_candidates(q, k, rewards), trainer.on_candidates(q, k[:, :2], rewards[:, :2])
        assert torch.isclose(padded, cut), key
        grad = torch.autograd.grad(padded, k)[0]
        assert torch.isfinite(grad).all() and not grad[:, 2].any(), key


def test_batches_are_of_one_task_with_its_instruction():
    pairs = toy_pairs()
    tasks = TaskPairs(**vars(pairs), tasks_Q=["qa"] * 24 + ["chat"] * 12)
    trainer = build("trainer", "llm-embedder:candidates=3", tasks)
    seen = []
    for step in range(60):
        batch = trainer.batch(step, 6, 0)
        names = {tasks.tasks_Q[q] for q in batch.query_B}
        assert len(names) == 1 and len(set(batch.query_B.tolist())) == 6
        seen += names
        query, key = instructions(seen[-1])
        assert all(t.startswith(query) for t in trainer.query_texts(batch))
        assert all(t.startswith(key) for t in trainer.key_texts([0, 1], batch))
    assert 28 <= seen.count("qa") <= 52, "tasks are drawn by their number of queries"
    mixed = build("trainer", "llm-embedder:homogeneous=false", tasks)
    assert any(len({tasks.tasks_Q[q] for q in mixed.batch(s, 6, 0).query_B}) > 1 for s in range(5))
    assert build("trainer", "llm-embedder", pairs).query_texts(batch)[0] == pairs.queries[batch.query_B[0]]


def test_candidates_are_drawn_without_replacement():
    trainer = build("trainer", "llm-embedder:candidates=5", toy_pairs())
    batch = trainer.batch(3, 6, 0)
    rows_BK = trainer.candidates(batch)
    assert (rows_BK[:, 0] == batch.positive_B).all() and (rows_BK[:, 1] == batch.negative_B).all()
    for q, rows in zip(batch.query_B, rows_BK, strict=True):
        assert len(set(rows.tolist())) == 5 and set(rows[1:].tolist()) <= set(map(int, trainer.pairs.negatives_Q[q]))
    many = build("trainer", "llm-embedder:candidates=9", toy_pairs()).candidates(batch)
    assert (many[:, 7:] == -1).all() and (many[:, :7] >= 0).all(), "there are six negatives"


# udr ------------------------------------------------------------------------------------------------------------


def listwise(s: np.ndarray, r: np.ndarray) -> float:
    """LambdaRank with reciprocal ranks, in plain loops."""
    terms = []
    for b in range(len(s)):
        real = [i for i in range(s.shape[1]) if np.isfinite(r[b, i])]
        order = sorted(range(s.shape[1]), key=lambda i: -s[b, i])
        rank = {i: n + 1 for n, i in enumerate(order)}
        for i in real:
            for j in real:
                if r[b, i] > r[b, j]:
                    margin = min(max(s[b, i] - s[b, j], -50), 50)
                    terms.append(abs(1 / rank[i] - 1 / rank[j]) * math.log1p(math.exp(-margin)))
    return float(np.mean(terms))


def test_the_listwise_loss_is_the_double_loop():
    rng = np.random.default_rng(0)
    s = rng.standard_normal((3, 4))
    r = np.array([[-1.0, -2, -3, -4], [-2.0, -2, -1, -4], [-1.0, -3, -2, -np.inf]])
    s[2, 3] = -np.inf
    got = lambda_mrr(torch.from_numpy(s), torch.from_numpy(r)).item()
    assert got == pytest.approx(listwise(s, r), abs=1e-12)
    assert lambda_mrr(torch.from_numpy(s), torch.from_numpy(r - 7)).item() == got, (
        "of the rewards only the order enters"
    )
    tied = s[1].copy()[[1, 0, 2, 3]]  # two candidates of equal reward change seats
    again = lambda_mrr(torch.from_numpy(np.stack([s[0], tied, s[2]])), torch.from_numpy(r)).item()
    assert again == pytest.approx(got, abs=1e-12)
    far = torch.tensor([[0.0, 1000.0]], dtype=torch.float64)
    assert lambda_mrr(far, torch.tensor([[1.0, 0.0]])).item() == pytest.approx(0.5 * 50, abs=1e-9)


def test_predicted_ranks_are_not_differentiated():
    s = rand(1, 3)
    r = torch.tensor([[2.0, 1.0, 0.0]], dtype=torch.float64)
    lambda_mrr(s, r).backward()
    rank = {i: n + 1 for n, i in enumerate(s[0].argsort(descending=True).tolist())}
    expected = np.zeros(3)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        g = -abs(1 / rank[i] - 1 / rank[j]) / (1 + math.exp((s[0, i] - s[0, j]).item())) / 3
        expected[i] += g
        expected[j] -= g
    assert np.allclose(s.grad[0].numpy(), expected, atol=1e-12)


def test_udr_adds_the_contrast_with_the_best_candidate_of_all_in_the_batch():
    pairs = toy_pairs()
    q, k = rand(2, 5), rand(2, 3, 5, seed=1)
    r = torch.tensor([[0.0, 2.0, 1.0], [3.0, 1.0, 2.0]], dtype=torch.float64)
    scores = q @ k.flatten(0, 1).T / 5**0.5
    own = torch.stack([scores[0, :3], scores[1, 3:]])
    contrast = F.cross_entropy(scores, torch.tensor([1, 3]))
    for factor in (0.0, 4.0):
        loss = build("trainer", f"udr:factor={factor}", pairs).on_candidates(q, k, r)
        assert torch.isclose(loss, contrast + factor * lambda_mrr(own, r))


def test_mining_proposes_the_nearest_without_the_querys_own_example():
    pairs = toy_pairs()
    pairs = replace(pairs, passages=[*pairs.passages, pairs.passages[4]])
    student = Student.new([*pairs.queries, *pairs.passages], width=16, layers=1, heads=2, vocabulary=330)
    asked: list[str] = []

    def score(query: str, texts: list[str]) -> list[float]:
        asked.append(query)
        return [float(len(t)) for t in texts]

    fresh = mine(pairs, student, score, 5, cosine=True)
    assert len(asked) == 36 and all(len(rows) == 5 for rows in fresh.negatives_Q)
    for q, rows in enumerate(fresh.negatives_Q):
        assert pairs.passages[q] not in [pairs.passages[r] for r in rows]
        assert set(fresh.scores_Q[q]) == {q, *map(int, rows)}
    build("trainer", "udr", fresh)  # and training goes on with them


# m2-bert --------------------------------------------------------------------------------------------------------


def test_orthogonal_projection_is_the_librarys_loss():
    trainer = build("trainer", "m2-bert:candidates=3", toy_pairs())
    q, k = rand(4, 6), rand(4, 3, 6, seed=1)
    loss = trainer.on_candidates(q, k, torch.zeros(4, 3, dtype=torch.float64))
    cos = [[float(F.cosine_similarity(q[b], k[b, i], dim=0)) for i in range(3)] for b in range(4)]
    assert loss.item() == pytest.approx(np.mean([(c - (i == 0)) ** 2 for row in cos for i, c in enumerate(row)]))
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    library = losses.CosineSimilarityLoss(None)
    labels = torch.tensor([[1.0, 0, 0]] * 4, dtype=torch.float64).flatten()
    flat = q[:, None].expand(4, 3, 6).reshape(12, 6)
    value = library.compute_loss_from_embeddings([flat, k.reshape(12, 6)], labels)
    assert loss.item() == pytest.approx(value.item(), abs=1e-9)


def test_batches_of_one_give_the_gradient_of_the_whole_batch():
    """True for orthogonal projection, false for a softmax over the batch."""
    pairs = toy_pairs()
    student = Student.new([*pairs.queries, *pairs.passages], width=16, layers=1, heads=2, vocabulary=330)
    weight = student.model.encoder.layer[0].output.dense.weight

    def gradients(key: str) -> tuple[torch.Tensor, torch.Tensor]:
        trainer = build("trainer", key, pairs)
        batch = trainer.batch(0, 6, 0)
        whole = torch.autograd.grad(trainer.loss(student, batch), weight)[0]
        parts = []
        for b in range(6):
            one = replace(batch, **{n: getattr(batch, n)[b : b + 1] for n in ("query_B", "positive_B", "negative_B")})
            parts.append(torch.autograd.grad(trainer.loss(student, one), weight)[0])
        return whole, torch.stack(parts).mean(0)

    whole, parts = gradients("m2-bert")
    assert torch.allclose(whole, parts, atol=1e-6) and whole.abs().max() > 1e-4
    whole, parts = gradients("in-batch")
    assert not torch.allclose(whole, parts, atol=1e-3)
