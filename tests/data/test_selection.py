"""Selections against their papers' definitions, computed naively, and the pipeline that fits and runs them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import LinearConstraint, minimize
from scipy.stats import kendalltau

from modicum.core import registry
from modicum.core.errors import UserError
from modicum.data import transport
from modicum.data.curate import CurateConfig, Curation, curate
from modicum.data.document import Document, Drop
from modicum.data.linear import Linear
from modicum.data.signals import Maker, Signals
from modicum.data.steps import Context, _selection, betr, concept_pruning, gotd, infimm_webmath, preselect, sampled

TOPICS = {
    "sea": ["ship", "sail", "harbour", "wave", "anchor", "tide", "captain", "storm", "island", "crew"],
    "kitchen": ["onion", "butter", "oven", "flour", "pepper", "sauce", "knife", "boil", "salt", "garlic"],
    "court": ["judge", "law", "appeal", "verdict", "witness", "lawyer", "trial", "statute", "clause", "ruling"],
}


def text(topic: str, seed: int, words: int = 60) -> str:
    rng = np.random.default_rng([seed, len(topic)])
    common = ["the", "of", "and", "to", "a", "in", "that", "it", "was", "for"]
    picks = rng.random(words)
    return " ".join(str(rng.choice(TOPICS[topic] if p < 0.4 else common)) for p in picks) + "."


def pool(count: int, topics: tuple[str, ...] = tuple(TOPICS)) -> list[Document]:
    return [Document(f"{t}{i}", text(t, i), t, t) for i in range(count) for t in topics]


def opened(choice: str, **context):
    step = registry.build("step", choice)
    step.open(Context(**context))
    return step


# The classifier


def test_the_classifier_is_at_the_minimum_of_its_loss() -> None:
    positive, negative = ([text(t, i) for i in range(n)] for t, n in (("sea", 30), ("court", 70)))
    model = Linear(bits=12, l2=1e-2, steps=400).fit(positive, negative)
    x = model.features([*positive, *negative]).toarray()
    y = np.repeat([1, -1], [30, 70])
    mass = np.repeat([0.5 / 30, 0.5 / 70], [30, 70])

    def loss(w: np.ndarray) -> float:
        return float(mass @ np.log1p(np.exp(-y * (x @ w[:-1] + w[-1]))) + 0.5e-2 * w[:-1] @ w[:-1])

    used = np.flatnonzero(x.any(axis=0))
    x = x[:, used]
    mine = np.append(model.weights_V[used], model.bias)
    best = minimize(loss, mine, method="L-BFGS-B", options={"maxiter": 200, "maxfun": 10**6})
    assert loss(mine) <= best.fun * 1.001
    again = Linear().set_state(model.state())
    held = [text("sea", 500), text("court", 500)]
    assert np.array_equal(again.logits(held), model.logits(held)) and model.logits(held)[0] > 0 > model.logits(held)[1]


def test_features_are_words_and_pairs_of_unit_length() -> None:
    row = Linear(bits=18).features(["one two one", "", "two one one"]).toarray()
    assert np.sum(row[0] > 0) == 4, "two words, two pairs"
    assert np.linalg.norm(row[0]) == pytest.approx(1) and not row[1].any()
    assert np.abs(row[0] - row[2]).max() > 0.1, "the order of words counts"
    with pytest.raises(UserError, match="0 negative"):
        Linear().fit(["a"], [])


# Shared pieces


@pytest.mark.parametrize("keep", [0.01, 0.1, 0.37, 0.9])
def test_the_cut_is_one_of_text_and_not_of_documents(keep: float) -> None:
    rng = np.random.default_rng(0)
    scores, sizes = rng.integers(0, 50, 300).astype(float), rng.integers(1, 1000, 300).astype(float)
    kept = _selection.best(scores, sizes, keep)
    taken, total = set(), 0.0
    for i in sorted(range(300), key=lambda i: (-scores[i], i)):
        if total >= keep * sizes.sum():
            break
        taken.add(i)
        total += sizes[i]
    assert set(np.flatnonzero(kept).tolist()) == taken


def test_every_benchmark_gives_as_many_examples() -> None:
    targets = {"large": [f"l{i}" for i in range(50)], "small": [f"s{i}" for i in range(7)]}
    chosen = _selection.level(targets, 0, 1000)
    assert sum(t[0] == "l" for t in chosen) == sum(t[0] == "s" for t in chosen) == 7
    assert _selection.level(targets, 0, 3) == _selection.level(targets, 0, 3)
    assert len(_selection.level(targets, 0, 3)) == 6


def test_a_column_is_used_again_for_the_same_texts_and_maker_only(tmp_path: Path) -> None:
    maker = Maker("test_selection_makers:counts", {"letter": "a"})
    import sys
    import types

    calls = []

    def counts(letter: str):
        def signal(texts):
            calls.append(len(texts))
            return np.array([[t.count(letter)] for t in texts], float)

        return signal

    module = types.ModuleType("test_selection_makers")
    module.counts = counts  # type: ignore[attr-defined]
    sys.modules["test_selection_makers"] = module
    texts = [f"{'a' * (i % 5)}{i}" for i in range(300)]
    first = Signals({"losses": maker}, tmp_path).column("losses", texts)
    assert calls == [256, 44] and first[:5, 0].tolist() == [0, 1, 2, 3, 4]
    assert np.array_equal(Signals({"losses": maker}, tmp_path).column("losses", texts), first) and calls == [256, 44]
    next(tmp_path.rglob("00001.npy")).unlink()  # a run that was killed in the second block
    assert np.array_equal(Signals({"losses": maker}, tmp_path).column("losses", texts), first)
    assert calls == [256, 44, 44]
    Signals({"losses": maker}, tmp_path).column("losses", [*texts[:-1], "other"])
    Signals({"losses": Maker(maker.function, {"letter": "b"})}, tmp_path).column("losses", texts)
    assert calls == [256, 44, 44, 256, 44, 256, 44]
    with pytest.raises(UserError, match="--models"):
        Signals().column("losses", texts)


# betr


def test_betr_ranks_as_a_loop_does() -> None:
    rng = np.random.default_rng(1)
    examples, sample = rng.normal(size=(9, 6)), rng.normal(size=(80, 6))
    sample[40:50] = sample[30:40]  # equal cosines
    ranks = np.empty((9, 80))
    cosines = np.empty((9, 80))
    for i in range(9):
        for j in range(80):
            cosines[i, j] = float(examples[i] @ sample[j])
        for rank, j in enumerate(sorted(range(80), key=lambda j: (-cosines[i, j], j)), 1):
            ranks[i, j] = rank
    best = ranks.min(axis=0)
    tie = [max(cosines[i, j] for i in range(9) if ranks[i, j] == best[j]) for j in range(80)]
    naive = sorted(range(80), key=lambda j: (best[j], -tie[j], j))
    assert betr.ranked(examples, sample).tolist() == naive
    mean = np.log2(1 / ranks).mean(axis=0)
    assert betr.ranked(examples, sample, "mean").tolist() == sorted(range(80), key=lambda j: (-mean[j], j))


def test_betr_serves_a_loose_benchmark_as_well_as_a_tight_one() -> None:
    """Cosines near 0.9 to the examples of one benchmark, near 0.3 to those of another: the best of both are taken."""
    rng = np.random.default_rng(2)
    d = 40
    tight, loose = np.eye(d)[0], np.eye(d)[1]

    def near(centre: np.ndarray, cosine: float, n: int) -> np.ndarray:
        noise = rng.normal(size=(n, d))
        noise[:, :2] = 0
        noise /= np.linalg.norm(noise, axis=1, keepdims=True)
        return cosine * centre + (1 - cosine**2) ** 0.5 * noise

    sample = np.concatenate([near(tight, 0.95, 50), near(loose, 0.55, 50), near(tight, 0.0, 100)])
    examples = np.concatenate([near(tight, 0.95, 10), near(loose, 0.55, 10)])
    top = betr.ranked(examples, sample)[:30]
    assert 10 <= sum(j < 50 for j in top) <= 20 and 10 <= sum(50 <= j < 100 for j in top) <= 20
    by_cosine = np.argsort(-(sample @ examples.T).max(axis=1))[:30]
    assert all(j < 50 for j in by_cosine), "what ranks are there to avoid"


def test_betr_selects_the_target_in_a_pool_that_it_was_not_fitted_on() -> None:
    targets = {"menu": [text("kitchen", 1000 + i) for i in range(20)]}
    step = opened("betr:keep=0.3,positives=0.3,dims=8,sample=60", targets=targets)
    step.load(step.fit(sampled(pool(40), 60)))
    kept = [d for d in step.run(pool(200)[150:]) if isinstance(d, Document)]
    assert np.mean([d.domain == "kitchen" for d in kept]) > 0.9
    scored = list(step_of_score(step, targets).run(pool(3)))
    assert all(isinstance(d, Document) and d.quality is not None for d in scored), "keep=1 scores and drops none"
    by_topic = {t: [d.quality for d in scored if d.domain == t] for t in TOPICS}
    assert min(by_topic["kitchen"]) > max(by_topic["sea"])


def step_of_score(fitted, targets):
    step = opened("betr:keep=1,positives=0.3,dims=8", targets=targets)
    step.load(fitted.classifier.state())
    return step


def test_betr_without_targets_says_what_to_type() -> None:
    with pytest.raises(UserError, match=r"betr:targets=\[FILE\]"):
        opened("betr").fit(pool(3))
    with pytest.raises(UserError, match="keep=0"):
        opened("betr:keep=0")


# preselect


def test_strength_is_kendalls_tau() -> None:
    losses = np.random.default_rng(3).permutation(60 * 5).reshape(60, 5).astype(float)
    tau = [kendalltau(np.arange(5), -row).statistic for row in losses]
    assert np.allclose(preselect.strength(losses), (np.array(tau) + 1) / 2)
    assert preselect.strength(np.array([[3.0, 2, 1], [1, 2, 3], [2, 2, 1]])).tolist() == [1, 0, 2 / 3], "a tie is wrong"
    # Pearson's r asks how far apart the losses are: a near miss
    assert preselect.strength(np.array([[9.0, 8.99, 8.98, 1.0]]))[0] == 1


def test_totals_and_means_over_tokens_differ_across_tokenizers() -> None:
    totals, tokens = np.array([[100.0, 90.0]]), np.array([50, 40])
    assert preselect.strength(totals)[0] == 1 and preselect.strength(totals / tokens)[0] == 0


def test_preselect_keeps_what_better_models_know() -> None:
    """Better models have lower losses on kitchens, higher ones at sea, and no order in court."""

    def losses(texts):
        rows = []
        for t in texts:
            words = t.split()
            kitchen, sea = (sum(w in TOPICS[k] for w in words) for k in ("kitchen", "sea"))
            noise = int(hashlib.sha256(t.encode()).hexdigest()[:4], 16) % 3 - 1
            rows.append([100 - (kitchen - sea) * m + noise * (m == 1) for m in range(3)])
        return np.array(rows, float)

    step = opened("preselect:keep=0.3,shortest=10", signals=Signals({"losses": losses}))
    kept = [d for d in step.run(pool(60)) if isinstance(d, Document)]
    assert np.mean([d.domain == "kitchen" for d in kept]) > 0.9
    with pytest.raises(UserError, match="--models"):
        opened("preselect").fit(pool(3))


def test_preselects_classes() -> None:
    strength = np.array([1, 1, 0.5, 0, 0.2, 1, 0.7, 0.1, 0.3, 0.9])
    positive, negative = preselect.classes(strength, 0.1)
    assert sorted(positive) == [0, 1, 5] and sorted(negative) == [3, 4, 7], "all pairs right; as many of the weakest"
    positive, negative = preselect.classes(strength, 0.4)
    assert sorted(positive) == [0, 1, 5, 9] and sorted(negative) == [3, 4, 7, 8], "too few are all right"


# gotd


def test_the_calibrated_gradient_is_the_exact_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(4)
    cost = rng.random((6, 6))
    a = b = np.full(6, 1 / 6)
    f, h = transport.potentials(cost, a, b, epsilon=5e-3, iterations=50_000)
    soft = transport.potentials(cost, a, b, epsilon=0.1)
    monkeypatch.setattr(transport, "DIRECT", 0)
    for direct, logarithms in zip(soft, transport.potentials(cost, a, b, epsilon=0.1), strict=True):
        assert np.allclose(logarithms - logarithms.mean(), direct - direct.mean(), atol=1e-6), "in the log domain"
    g = transport.calibrated(f)
    eps = 1e-4
    for i in range(6):
        moved = a - eps / 5
        moved[i] = a[i] + eps
        ahead = transport.exact(cost, moved, b)[0]
        moved = a + eps / 5
        moved[i] = a[i] - eps
        numeric = (ahead - transport.exact(cost, moved, b)[0]) / (2 * eps)
        low = (ahead - transport.exact(cost, a, b)[0]) / eps
        # The exact cost is piecewise linear and has a kink at equal weights: the potential lies between its slopes.
        assert min(low, 2 * numeric - low) - 0.01 <= g[i] <= max(low, 2 * numeric - low) + 0.01
    extended = transport.soft_transform(cost, h, np.log(b), 5e-3)
    assert np.allclose(extended, f, atol=1e-5), "f of an unseen point, at the points it was solved on"


def test_gotd_takes_what_is_new_and_not_what_is_near() -> None:
    """Candidates: sea, and a little kitchen. Target: half of each. The sea is known already."""
    candidates = [Document(f"s{i}", text("sea", i), "sea", "s") for i in range(95)]
    candidates += [Document(f"k{i}", text("kitchen", i), "kitchen", "k") for i in range(15)]
    targets = {"half": [text(t, 900 + i) for i in range(20) for t in ("sea", "kitchen")]}
    step = opened("gotd:keep=0.1,dims=8", targets=targets)
    kept = [d for d in step.run(candidates) if isinstance(d, Document)]
    assert np.mean([d.domain == "kitchen" for d in kept]) > 0.9
    away = opened("gotd:keep=0.1,dims=8,contrast=true", targets=targets)
    assert not any(d.domain == "kitchen" for d in away.run(candidates) if isinstance(d, Document))
    nearest = opened("betr:keep=0.1,dims=8,positives=0.1", targets=targets)
    near = [d for d in nearest.run(candidates) if isinstance(d, Document)]
    assert np.mean([d.domain == "kitchen" for d in near]) < 0.9, "a nearest-neighbour selection takes both halves"


def test_gotds_score_is_minus_the_potential() -> None:
    targets = {"t": [text("court", i) for i in range(8)]}
    documents = pool(10)
    step = opened("gotd:dims=8,epsilon=0.05", targets=targets)
    arrays = step.fit(documents)
    step.load(arrays)
    space = _selection.Space(Context(), 2000).set_state(arrays)
    cost = transport.cosine_cost(space([d.text for d in documents]), arrays["gotd_target"])
    f, _ = transport.potentials(cost, np.full(30, 1 / 30), np.full(8, 1 / 8), epsilon=0.05, iterations=5000)
    scores = step.scores([d.text for d in documents])
    assert np.allclose(scores - scores.mean(), f.mean() - f, atol=1e-4)
    assert gotd.Config().contrast is False


# concept-pruning


def test_quotas_solve_the_quadratic_program() -> None:
    rng = np.random.default_rng(5)
    for balance, sizes in ((0.5, [40, 200, 9, 60, 100]), (0.0, [3, 300, 50, 20, 80]), (1.0, [30, 30, 30, 30, 30])):
        size = np.array(sizes)
        total, p = round(0.5 * size.sum()), rng.dirichlet(np.full(5, 0.7))
        got = concept_pruning.quotas(p, size, total, balance)
        least = np.minimum(np.maximum(balance * total / 5, 1), size - 1)
        assert got.sum() == total and (got <= size).all() and (got >= np.floor(least)).all()
        best = minimize(
            lambda n, p=p, total=total: ((n - p * total) ** 2).sum(),
            np.clip(np.full(5, total / 5), least, size),
            bounds=list(zip(least, size, strict=True)),
            constraints=LinearConstraint(np.ones((1, 5)), total, total),
            method="SLSQP",
            options={"maxiter": 500, "ftol": 1e-12},
        )
        assert np.abs(got - best.x).max() <= 1.001, "the same but for rounding"


def test_spread_and_distance_between_clusters_by_loops() -> None:
    rng = np.random.default_rng(6)
    x = rng.normal(size=(60, 5))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    centroids, cluster = concept_pruning.spherical_kmeans(x.astype(np.float32), 6, 0)
    cluster[cluster == 5] = 4
    cluster[:1] = 5  # one member: no spread of its own
    distance = np.array([1 - x[i] @ centroids[cluster[i]] for i in range(60)])
    intra = concept_pruning.spread(distance, cluster, 6)
    own = [np.mean([distance[i] for i in range(60) if cluster[i] == j]) for j in range(5)]
    assert np.allclose(intra[:5], own) and intra[5] == pytest.approx(np.mean(own))
    for j in range(6):
        others = sorted(1 - float(centroids[j] @ centroids[i]) for i in range(6) if i != j)
        assert concept_pruning.apart(centroids, 3)[j] == pytest.approx(np.mean(others[:3]), abs=1e-6)


def test_pruning_thins_the_dense_cluster_and_its_prototypes() -> None:
    """Sixty near copies of one text and sixty different ones: a uniform rate would keep half of each."""
    template = text("court", 7)
    copies = [Document(f"c{i}", template + f" page{i}", "copy", "c") for i in range(60)]
    varied = [Document(f"v{i}", text("sea", i) + " " + text("kitchen", i), "varied", "v") for i in range(60)]
    step = opened("concept-pruning:keep=0.5,clusters=4,temperature=0.05,balance=0.1,dims=16")
    documents = [d for pair in zip(copies, varied, strict=True) for d in pair]
    out = list(step.run(documents))
    kept = [d for d in out if isinstance(d, Document)]
    assert len(kept) == 60 and sum(d.domain == "copy" for d in kept) < 20
    assert {d.reason for d in out if isinstance(d, Drop)} == {"prototype"}
    x = step.signatures(documents)
    centroids, cluster = concept_pruning.spherical_kmeans(x, 4, 0)
    distance = 1 - (x * centroids[cluster]).sum(axis=1)
    kept_ids = {d.id for d in kept}
    for j in range(4):
        inside = [distance[i] for i in range(120) if cluster[i] == j and documents[i].id in kept_ids]
        outside = [distance[i] for i in range(120) if cluster[i] == j and documents[i].id not in kept_ids]
        assert not inside or not outside or min(inside) >= max(outside), "the farthest stay"


# infimm-webmath


def test_thresholds_by_counting() -> None:
    rng = np.random.default_rng(8)
    positive, negative = rng.normal(1, 1, 200), rng.normal(-1, 1, 400)
    for recall in (0.5, 0.9, 0.98, 1.0):
        t = infimm_webmath.threshold_of_recall(positive, recall)
        assert (positive >= t).mean() >= recall
        higher = positive[positive > t]
        assert not len(higher) or (positive >= higher.min()).mean() < recall, "the largest such threshold"
    t = infimm_webmath.threshold_of_precision(positive, negative, 0.95)
    precision = [(positive >= x).sum() / ((positive >= x).sum() + (negative >= x).sum()) for x in np.sort(positive)]
    first = next(x for x, p in zip(np.sort(positive), precision, strict=True) if p >= 0.95)
    assert t == first


def test_the_two_stages_of_a_topic() -> None:
    """A first stage of high recall, and a last one of high precision taught by labels."""
    documents = pool(100)
    targets = {"t": [text("court", 2000 + i) for i in range(60)]}
    first = opened("infimm-webmath:recall=0.98,meta=first", targets=targets)
    kept = [d for d in first.run(documents) if isinstance(d, Document)]
    assert sum(d.domain == "court" for d in kept) >= 95 and all("first" in d.meta for d in kept)
    labelled = [Document(d.id, d.text, d.domain, d.source, {"topic_score": float(d.domain == "court")}) for d in kept]
    labelled += [Document(d.id, d.text, d.domain, d.source, {"topic_score": 0}) for d in pool(20, ("sea", "kitchen"))]
    last = opened("infimm-webmath:precision=0.99")
    final = [d for d in last.run(labelled) if isinstance(d, Document)]
    assert np.mean([d.domain == "court" for d in final]) >= 0.99 and len(final) >= 80
    with pytest.raises(UserError, match="topic_score"):
        opened("infimm-webmath:precision=0.9").fit(documents)


# The pipeline


def contents(folder: Path) -> dict[str, str]:
    skipped = ("curation.json", ".work")
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and not str(p.relative_to(folder)).startswith(skipped)
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pool")
    for part in range(4):
        lines = [json.dumps({"text": d.text, "domain": d.domain}) for d in pool(80)[part * 60 : part * 60 + 60]]
        (root / f"{part}.jsonl").write_text("\n".join([*lines, lines[0]]))  # and a duplicate
    (root.parent / "menu.jsonl").write_text(
        "\n".join(json.dumps({"text": text("kitchen", 3000 + i)}) for i in range(30))
    )
    return root


def config(source: Path, **more) -> CurateConfig:
    betr = {"method": "betr", "targets": [str(source.parent / "menu.jsonl")], "keep": 0.3, "dims": 8, "sample": 90}
    steps = more.pop("steps", ["normalise", "exact-dedup", betr, "concept-pruning:keep=0.9,clusters=3,dims=8"])
    return CurateConfig(steps=steps, vocab_size=300, heldout=0.1, group_bytes=6000, **more)


def test_a_fitted_step_in_the_pipeline(source: Path, tmp_path: Path) -> None:
    one = curate(str(source), tmp_path / "one", config(source), processes=1)
    two = curate(str(source), tmp_path / "two", config(source), processes=2)
    assert contents(one.folder) == contents(two.folder)
    assert sorted(p.name for p in (one.folder / "fitted").iterdir()) == ["1-betr.npz", "2-concept-pruning.npz"]
    kept = [d for split in ("train", "heldout") for d in one.documents(split)]
    assert np.mean([d.domain == "kitchen" for d in kept]) > 0.9
    assert one.drops["exact-dedup"] == {"duplicate": 4} and one.drops["betr"]["not-selected"] > 150
    # its own way through, without a pipeline
    documents = [d for d in pool(80)]
    step = opened(f"betr:keep=0.3,dims=8,sample=90,targets=[{source.parent / 'menu.jsonl'}]")
    alone = sum(isinstance(d, Document) for d in step.run(documents))
    assert alone == pytest.approx(len(kept) / 0.9, rel=0.15)


def test_a_fit_is_done_once_and_again_for_other_targets(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    real = betr.Betr.fit

    def counted(self, sample):
        calls.append(len(sample))
        return real(self, sample)

    monkeypatch.setattr(betr.Betr, "fit", counted)
    monkeypatch.setattr(concept_pruning.ConceptPruning, "fit", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(UserError, match="no space left"):
        curate(str(source), tmp_path / "out", config(source), processes=1)
    monkeypatch.undo()
    monkeypatch.setattr(betr.Betr, "fit", counted)
    curate(str(source), tmp_path / "out", config(source), processes=1)
    assert calls == [90], "what was fitted is read again"
    curate(str(source), tmp_path / "out", config(source), processes=1)
    assert calls == [90]
    target = source.parent / "menu.jsonl"
    before = target.read_text()
    try:
        target.write_text(before + "\n" + json.dumps({"text": text("sea", 4000)}))
        curate(str(source), tmp_path / "out", config(source), processes=1)
        assert calls == [90, 90], "other targets, another selection"
    finally:
        target.write_text(before)
    with pytest.raises(UserError, match=r"nowhere\.jsonl does not exist"):
        curate(str(source), tmp_path / "other", config(source, steps=["betr:targets=[nowhere.jsonl]"]))


def test_a_first_step_can_be_fitted(source: Path, tmp_path: Path) -> None:
    only = {"method": "betr", "targets": [str(source.parent / "menu.jsonl")], "keep": 1, "dims": 8, "sample": 50}
    made: Curation = curate(str(source), tmp_path / "out", config(source, steps=[only]), processes=1)
    documents = [d for split in ("train", "heldout") for d in made.documents(split)]
    assert len(documents) == 244 and all(d.quality is not None for d in documents)
    quality = {t: np.mean([d.quality for d in documents if d.domain == t]) for t in TOPICS}
    assert quality["kitchen"] > max(quality["sea"], quality["court"])
