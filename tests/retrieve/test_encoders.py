"""Encoders: the closed-form head against naive float64, real models made on disk, and the vector indexes' doors."""

import json
import shutil

import numpy as np
import pytest
import torch
from retrieve_toys import TEXTS, plain_modules, random_llama

from modicum.core.errors import CorruptError, UserError
from modicum.core.registry import build
from modicum.data.latent import Latent
from modicum.data.tokenizer import Tokenizer
from modicum.retrieve.encoders import load_encoder, make_encoder, unit
from modicum.retrieve.encoders.decoder import Config, DecoderEncoder
from modicum.retrieve.encoders.sentence_transformers import SentenceTransformer
from modicum.retrieve.indexes import Index, open_index
from modicum.retrieve.indexes.exact import Exact
from modicum.retrieve.indexes.hnsw import HNSW
from modicum.retrieve.measure import measure
from modicum.retrieve.whiten import Whitener


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    return random_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A random BERT that sentence-transformers opens with mean pooling."""
    from transformers import BertConfig, BertModel, BertTokenizer

    folder = tmp_path_factory.mktemp("models") / "bert"
    words = sorted({w for t in TEXTS for w in t.lower().split()})
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    BertModel(
        BertConfig(
            vocab_size=len(words) + 5, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
        )
    ).save_pretrained(folder)
    return folder


def decoder_encoder(folder, **knobs):
    return DecoderEncoder(Config(model=str(folder), **knobs))


def naive_pool(folder, texts, layers, sif):
    """Hidden states by transformers, one text at a time, averaged in float64."""
    from transformers import LlamaForCausalLM

    model, tokenizer = LlamaForCausalLM.from_pretrained(folder).eval(), Tokenizer.load(folder)
    rows = [tokenizer.encode(t, specials=False)[:63] for t in texts]
    flat = [i for r in rows for i in r]
    pooled = []
    for row in rows:
        with torch.no_grad():
            states = model(torch.tensor([[tokenizer.eos_id, *row]]), output_hidden_states=True).hidden_states
        parts = []
        for layer in layers:  # transformers puts the final norm into the last of hidden_states
            h = states[layer][0, 1:].double().numpy()
            h = h / np.linalg.norm(h, axis=1, keepdims=True)
            w = np.array([sif / (sif + flat.count(i) / len(flat)) for i in row])
            parts.append((w[:, None] * h).sum(0) / w.sum() if row else np.zeros(16))
        pooled.append(np.concatenate(parts))
    return np.stack(pooled)


@pytest.mark.parametrize("layers", [(-1,), (0, -1), (1,)])
@pytest.mark.parametrize("batch_tokens", [8, 4096])
def test_pooling_agrees_with_transformers(decoder, layers, batch_tokens):
    encoder = decoder_encoder(decoder, layers=layers, sif=1e-2, batch_tokens=batch_tokens, latent=0)
    encoder.count(TEXTS)
    assert np.allclose(encoder.pool(TEXTS), naive_pool(decoder, TEXTS, layers, 1e-2), atol=2e-5)


def test_final_vectors_are_whitened_and_do_not_depend_on_the_company(decoder):
    encoder = decoder_encoder(decoder)
    encoder.count(TEXTS)
    encoder.fit([encoder.pool(TEXTS)])
    together = encoder.encode(TEXTS)
    alone = np.concatenate([encoder.encode([t]) for t in TEXTS])
    assert together.dtype == np.float32 and np.allclose(together, alone, atol=1e-4)
    assert np.allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("power,remove", [(1.0, 0), (0.5, 2), (0.0, 3)])
def test_whitening_agrees_with_a_naive_computation(power, remove):
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((500, 12)) @ rng.standard_normal((12, 12)) + 5).astype(np.float32)
    whitener = Whitener(power=power, remove=remove, shrink=0.0).fit([x[:200], x[200:]])
    y = whitener(x)
    covariance = np.cov(x.astype(np.float64).T, bias=True)
    values = np.sort(np.linalg.eigvalsh(covariance))[::-1][remove:]
    assert y.shape == (500, 12 - remove)
    assert np.allclose(y.mean(0), 0, atol=1e-3)
    expected = values ** (1 - power)
    assert np.allclose(np.cov(y.T, bias=True), np.diag(expected), rtol=1e-3, atol=1e-3 * expected[0])


def test_whitening_fewer_vectors_than_dimensions_stays_finite():
    x = np.random.default_rng(0).standard_normal((3, 10)).astype(np.float32)
    assert np.isfinite(Whitener().fit([x])(x)).all()
    assert np.isfinite(unit(Whitener().fit([x[:1]])(x[:1]))).all()  # one vector: nothing to tell apart


@pytest.mark.parametrize("kind", ["decoder", "bert"])
def test_saved_encoder_gives_the_same_vectors(kind, request, tmp_path):
    folder = request.getfixturevalue(kind)
    encoder = make_encoder(str(folder))
    assert isinstance(encoder, DecoderEncoder if kind == "decoder" else SentenceTransformer)
    encoder.count(TEXTS)
    encoder.fit([encoder.pool(TEXTS)])
    encoder.save(tmp_path / "encoder")
    assert {p.suffix for p in (tmp_path / "encoder").iterdir()} == {".json", ".safetensors"}
    again = load_encoder(tmp_path / "encoder")
    assert np.array_equal(again.encode_queries(TEXTS), encoder.encode_queries(TEXTS))
    assert np.allclose(np.linalg.norm(encoder.encode(TEXTS[:3]), axis=1), 1, atol=1e-5)


def test_encoder_finds_its_model_after_a_move_and_refuses_another(decoder, tmp_path):
    shutil.copytree(decoder, tmp_path / "a" / "model")
    encoder = make_encoder(str(tmp_path / "a" / "model"))
    encoder.count(TEXTS)
    encoder.fit([encoder.pool(TEXTS)])
    encoder.save(tmp_path / "a" / "index" / "encoder")
    shutil.move(tmp_path / "a", tmp_path / "b")
    moved = load_encoder(tmp_path / "b" / "index" / "encoder")
    assert np.array_equal(moved.encode(TEXTS), encoder.encode(TEXTS))
    shutil.move(tmp_path / "b" / "model", tmp_path / "elsewhere")
    with pytest.raises(UserError, match="--encoder"):
        load_encoder(tmp_path / "b" / "index" / "encoder")
    load_encoder(tmp_path / "b" / "index" / "encoder", model=str(tmp_path / "elsewhere"))
    config = json.loads((tmp_path / "elsewhere" / "config.json").read_text())
    (tmp_path / "elsewhere" / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    with pytest.raises(UserError, match="not the model"):
        load_encoder(tmp_path / "b" / "index" / "encoder", model=str(tmp_path / "elsewhere"))


def test_wrong_encoders_get_one_clear_line(decoder, tmp_path):
    for spec in (str(tmp_path / "none"), str(tmp_path), "./nowhere"):
        with pytest.raises(UserError) as error:
            make_encoder(spec)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="layer"):
        decoder_encoder(decoder, layers=(3,))
    with pytest.raises(UserError, match="not fitted"):
        decoder_encoder(decoder).encode(["x"])


# vector indexes: what conformance does not ask ------------------------------------------------------------------


def vectors(n: int, dim: int = 16, seed: int = 0) -> np.ndarray:
    return unit(np.random.default_rng(seed).standard_normal((n, dim)))


def test_exact_agrees_with_faiss_flat_index():
    import faiss

    x, q = vectors(1000), vectors(7, seed=1)
    flat = faiss.IndexFlatIP(16)
    flat.add(x)
    scores, rows = flat.search(q, 20)
    index = build("index", "exact")
    index.build([(np.arange(1000) + 5, x)])
    hits = index.search(q, 20)
    assert np.array_equal(hits.ids_QK, rows + 5) and np.allclose(hits.scores_QK, scores)


def test_hnsw_recall_rises_with_the_beam_and_is_measured():
    x, q = vectors(3000, 32), vectors(50, 32, seed=1)
    exact = build("index", "exact")
    exact.build([(np.arange(3000), x)])
    truth = exact.search(q, 10).ids_QK
    figures = []
    for ef in (10, 400):
        index = build("index", f"hnsw:M=8,ef_construction=80,ef_search={ef}")
        index.build([(np.arange(3000), x)])
        figures.append(measure(index, q, truth))
    assert figures[0]["recall@10"] < figures[1]["recall@10"] and figures[1]["recall@10"] > 0.98
    best = measure(exact, q, truth, subset=None)
    assert best["recall@10"] == 1 and best["queries_per_second"] > 0
    assert best["memory_bytes"] == 3000 * (32 * 4 + 8) <= best["disk_bytes"] < 1.05 * 3000 * (32 * 4 + 8)


def test_predicted_cost_is_near_the_measured_one():
    for choice in ("exact", "hnsw:M=16"):
        index = build("index", choice)
        index.build([(np.arange(5000), vectors(5000, 64))])
        figures = measure(index, vectors(2, 64), np.zeros((2, 1), np.int64))
        cost = index.cost(5000, 64)
        assert 0.8 < figures["disk_bytes"] / cost.disk_bytes < 1.2, choice
        assert figures["memory_bytes"] <= cost.peak_bytes, choice


def test_an_index_opens_memory_mapped_and_by_its_own_class_only(tmp_path):
    index = build("index", "exact")
    index.build([(np.arange(10), vectors(10))])
    index.save(tmp_path / "i")
    assert isinstance(Exact.load(tmp_path / "i").vectors_ND, np.memmap)
    assert isinstance(Index.load(tmp_path / "i"), Exact)
    with pytest.raises(UserError, match="Exact"):
        HNSW.load(tmp_path / "i")
    with pytest.raises(UserError, match=r"index\.json"):
        open_index(tmp_path)
    (tmp_path / "i" / "index.json").write_text("{")
    with pytest.raises(CorruptError, match="damaged"):
        open_index(tmp_path / "i")


# latent terms ---------------------------------------------------------------------------------------------------


def test_latent_terms_agree_with_a_dense_svd():
    from collections import Counter

    from modicum.retrieve.bm25 import tokenize

    rng = np.random.default_rng(0)
    words = [f"w{i}x" for i in range(60)]
    topics = rng.random((6, 60)) ** 6
    texts = [" ".join(rng.choice(words, 40, p=(t := topics[rng.integers(6)]) / t.sum())) for _ in range(120)]
    latent = Latent(5).fit(texts)
    counts = [Counter(tokenize(t)) for t in texts]
    df = {t: sum(t in c for c in counts) for t in latent.terms}
    x = np.array(
        [
            [(1 + np.log(c[t])) * np.log(1 + (120 - df[t] + 0.5) / (df[t] + 0.5)) if c[t] else 0 for t in latent.terms]
            for c in counts
        ]
    )
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    w = np.linalg.svd(x, full_matrices=False)[2]
    expected = x @ w[:5].T
    got = latent(texts)
    assert got.shape == (120, 5)
    assert np.allclose(got @ got.T, expected @ expected.T, atol=5e-3 * np.abs(expected @ expected.T).max())


def test_latent_terms_survive_saving_and_odd_texts():
    latent = Latent(3).fit(TEXTS)
    again = Latent(3)
    again.set_state(latent.state())
    assert np.array_equal(latent([*TEXTS, "été ? unknown words", ""]), again([*TEXTS, "été ? unknown words", ""]))
    assert not latent(["zzz", ""]).any()
    for texts in ([], [""], ["one text alone"]):
        assert Latent(4).fit(texts)(["one text", ""]).shape[0] == 2
    with pytest.raises(UserError, match="dims"):
        make_encoder("lsa:dims=many")


def test_early_layers_spare_the_rest(decoder):
    encoder = decoder_encoder(decoder, layers=(0, 1), latent=0)
    encoder.count(TEXTS)
    expected = naive_pool(decoder, TEXTS, (0, 1), 1e-3)
    del encoder._decoder.layers[1].attention  # would fail if it were run
    assert np.allclose(encoder.pool(TEXTS), expected, atol=2e-5)


def test_encoder_knobs_are_the_registrys(decoder):
    encoder = make_encoder(f"decoder:model={decoder},layers=[0,1],max_tokens=20")
    assert encoder.layers == (0, 1) and encoder.max_tokens == 20
    for spec, message in (
        (f"decoder:model={decoder},layer=[0]", "Did you mean 'layers'"),
        (f"decoder:model={decoder},layers=[]", "takes no hidden state"),
        ("decoder:layers=[0]", "model"),
        ("lsa:dims=0", "dims"),
    ):
        with pytest.raises(UserError, match=message):
            make_encoder(spec)


def test_an_encoder_cut_to_layers_and_dimensions_is_the_model_cut(bert, tmp_path):
    """`layers` and `dims` against a model that was saved with fewer layers, its vectors cut, then of length 1."""
    from transformers import AutoTokenizer, BertConfig, BertModel

    torch.manual_seed(1)
    words = len((bert / "vocab.txt").read_text().split("\n"))
    shape = dict(vocab_size=words, hidden_size=16, num_attention_heads=2, intermediate_size=32)
    deep = BertModel(BertConfig(num_hidden_layers=3, **shape)).eval()
    shallow = BertModel(BertConfig(num_hidden_layers=2, **shape)).eval()
    shallow.load_state_dict({k: v for k, v in deep.state_dict().items() if "layer.2" not in k})
    for name, model in (("deep", deep), ("shallow", shallow)):
        model.save_pretrained(tmp_path / name)
        AutoTokenizer.from_pretrained(bert).save_pretrained(tmp_path / name)
        plain_modules(tmp_path / name)
    texts = [t for t in TEXTS if t]
    cut = make_encoder(f"sentence-transformers:model={tmp_path / 'deep'},layers=2,dims=6,unit=false").encode(texts)
    whole = make_encoder(f"sentence-transformers:model={tmp_path / 'shallow'},unit=false").encode(texts)
    assert cut.shape == (len(texts), 6) and np.allclose(cut, whole[:, :6], atol=1e-6)
    of_length_1 = make_encoder(f"sentence-transformers:model={tmp_path / 'deep'},layers=2,dims=6").encode(texts)
    assert np.allclose(of_length_1, unit(whole[:, :6]), atol=1e-6)  # cut first, then the length
    tokens = make_encoder(f"sentence-transformers:model={tmp_path / 'shallow'},unit=false").tokens(texts)
    assert np.allclose([t.mean(0) for t in tokens], whole, atol=1e-6)
    with pytest.raises(UserError, match="layers=4"):
        make_encoder(f"sentence-transformers:model={tmp_path / 'deep'},layers=4")
    with pytest.raises(UserError, match="one vector for a text"):
        make_encoder("lsa").tokens(texts)
