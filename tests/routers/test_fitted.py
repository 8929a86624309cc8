import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.errors import CheckpointError, DataError, InputError
from anabranch.registry import BUILTIN, resolve
from anabranch.routers import fitted as fitted_module
from anabranch.routers import strategies
from anabranch.routers.contract.predictor import Ranked
from anabranch.routers.data import pool_of, read_prices
from anabranch.routers.embed import Embedder, unit_vectors
from anabranch.routers.embed.hashed import Hashed
from anabranch.routers.fitted import FittedRouter, load_folder, save_folder
from made_outcomes import MODELS, Lengths, WordMeans, made_outcomes


@pytest.fixture(autouse=True)
def known_by_name(monkeypatch):
    monkeypatch.setitem(BUILTIN["predictor"], "word_means", "made_outcomes:WordMeans")
    monkeypatch.setitem(BUILTIN["embedder"], "lengths", "made_outcomes:Lengths")
    yield
    resolve.cache_clear()


def fitted(data=None, **fields):
    data = made_outcomes(60) if data is None else data
    strategy = Ranked(Ranked.Config(predictor=WordMeans.Config(**fields), trade_off=2.5)).fit(data)
    embedder = Hashed(Hashed.Config(dim=32)).fit(data.query)
    return FittedRouter(strategy=strategy, models=pool_of(MODELS).models, embedder=embedder, about={"seed": 3})


def same(first, second):
    """To the bit."""
    for one, other in ((first.strategy, second.strategy), (first.embedder, second.embedder)):
        (arrays, facts), (others, other_facts) = one.state(), other.state()
        assert facts == other_facts
        assert arrays.keys() == others.keys()
        for name, value in arrays.items():
            assert value.dtype == others[name].dtype
            assert value.tobytes() == others[name].tobytes()
        assert one.config == other.config
    return first.models == second.models and first.about == second.about


def test_a_router_is_read_back_to_the_bit(tmp_path):
    router = fitted(noise=0.1)
    router.save(tmp_path / "router.safetensors")
    again = FittedRouter.load(tmp_path / "router.safetensors")
    assert same(router, again)
    for text in ("add the numbers 7", "write verses", "something else"):
        assert again.route(text) == router.route(text)
    data = made_outcomes(20, 5)
    np.testing.assert_array_equal(
        again.strategy.play(data, again.pool).model_N, router.strategy.play(data, router.pool).model_N
    )


def test_models_keep_prices_and_sizes(tmp_path):
    (tmp_path / "prices.json").write_text(
        json.dumps({"small": {"input": 0.1, "output": 0.3, "cached_input": 0.05, "size": "8B", "feature": "f"}})
    )
    models = pool_of(MODELS, read_prices(tmp_path / "prices.json")).models
    FittedRouter(strategy=fitted().strategy, models=models).save(tmp_path / "r.safetensors")
    assert FittedRouter.load(tmp_path / "r.safetensors").models == models


def test_strange_arrays_survive(tmp_path, monkeypatch):
    router = fitted()
    arrays = {
        "scalar": np.array(1.5),
        "none": np.zeros((0, 3)),
        "strided": np.arange(10)[::3],
        "flags": np.array([True, False]),
        "columns": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "whole": np.array([-1], np.int64),
        "bits": np.array([np.nan, -0.0, np.inf]),
    }
    monkeypatch.setattr(router.strategy, "state", lambda: (arrays, {"models": [], "text": "ü\n\"'"}))
    router.save(tmp_path / "r.safetensors")
    tensors, content = fitted_module._read(tmp_path / "r.safetensors")
    for name, value in arrays.items():
        found = tensors[f"strategy.{name}"]
        assert (found.dtype, found.shape, found.tobytes()) == (value.dtype, value.shape, value.tobytes())
    assert content["facts"]["text"] == "ü\n\"'"


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    path = tmp_path_factory.mktemp("router") / "router.safetensors"
    fitted().save(path)
    return path.read_bytes()


@given(st.data())
def test_a_flipped_bit_is_noticed(content, tmp_path_factory, data):
    place, bit = data.draw(st.integers(0, len(content) - 1)), data.draw(st.integers(0, 7))
    changed = bytearray(content)
    changed[place] ^= 1 << bit
    path = tmp_path_factory.mktemp("flip") / "router.safetensors"
    path.write_bytes(changed)
    with pytest.raises(CheckpointError, match="router"):
        FittedRouter.load(path)


@pytest.mark.parametrize("share", [0, 0.01, 0.3, 0.9, 0.999])
def test_a_file_that_was_cut_off_is_refused(content, tmp_path, share):
    path = tmp_path / "router.safetensors"
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match="damaged or no router"):
        FittedRouter.load(path)


def test_other_files_versions_and_kinds_are_refused(tmp_path, monkeypatch):
    from safetensors.numpy import save_file

    path = tmp_path / "r.safetensors"
    with pytest.raises(CheckpointError, match="is not there"):
        FittedRouter.load(path)
    save_file({"a": np.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="no router of ours"):
        FittedRouter.load(path)
    monkeypatch.setattr(fitted_module, "VERSION", 2)
    fitted().save(path)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"of version 2; this version of anabranch reads 1"):
        FittedRouter.load(path)


def test_a_part_that_is_not_installed_is_named(tmp_path, monkeypatch):
    fitted().save(tmp_path / "r.safetensors")
    monkeypatch.delitem(BUILTIN["predictor"], "word_means")
    resolve.cache_clear()
    with pytest.raises(CheckpointError, match=r"r.safetensors cannot be used here: .*word_means"):
        FittedRouter.load(tmp_path / "r.safetensors")


def test_facts_that_are_missing_are_named(tmp_path, monkeypatch):
    router = fitted()
    arrays, facts = router.strategy.state()
    monkeypatch.setattr(router.strategy, "state", lambda: (arrays, {"models": facts["models"]}))
    router.save(tmp_path / "r.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks what its strategy needs .*'words'"):
        FittedRouter.load(tmp_path / "r.safetensors")


def test_what_cannot_be_saved_is_refused_and_leaves_no_file(tmp_path, monkeypatch):
    router = fitted()
    for state, message in (
        (({"a": np.array(["text"])}, {}), "only arrays of numbers"),
        (({"a": np.array([None])}, {}), "only arrays of numbers"),
        (({}, {"a": object()}), "not ready for JSON"),
    ):
        monkeypatch.setattr(router.strategy, "state", lambda state=state: state)
        with pytest.raises(InputError, match=message):
            router.save(tmp_path / "r.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_folder_holds_routers_and_knows_what_they_learned_from(tmp_path):
    data = made_outcomes(60)
    save_folder(tmp_path / "routers", {"one": fitted(data), "two-b": fitted(data, noise=0.5)}, data, {"data": "abc"})
    found = load_folder(tmp_path / "routers")
    assert list(found.routers) == ["one", "two-b"]
    assert (found.manifest["data"], found.manifest["models"]) == ("abc", list(MODELS))
    assert found.has_seen(f" {data.query[3].upper()}")
    assert not found.has_seen(data.query[3] + "?")
    with pytest.raises(DataError, match="2 of 2 questions were learned from"):
        found.check_unseen(data.take([0, 1]))
    found.check_unseen(made_outcomes(60, seed=1))
    assert list(load_folder(tmp_path / "routers", ["two-b"]).routers) == ["two-b"]
    single = load_folder(tmp_path / "routers" / "one.safetensors")
    assert list(single.routers) == ["one"]
    assert same(single.routers["one"], found.routers["one"])


def test_routers_of_a_folder_share_an_embedder_that_learns_nothing(tmp_path):
    data = made_outcomes(30)
    embedder = Lengths(Lengths.Config())
    one = FittedRouter(strategy=fitted(data).strategy, models=pool_of(MODELS).models, embedder=embedder)
    save_folder(tmp_path / "r", {"one": one, "two": one, "own": fitted(data)}, data, {})
    found = load_folder(tmp_path / "r").routers
    assert found["one"].embedder is found["two"].embedder
    assert found["own"].embedder.kind == "hashed"
    np.testing.assert_array_equal(found["one"].embedder.embed(["a", "bb"]), embedder.embed(["a", "bb"]))


def test_folders_that_cannot_be_read_or_written(tmp_path):
    with pytest.raises(CheckpointError, match="make one with fit"):
        load_folder(tmp_path / "none")
    data = made_outcomes(10)
    save_folder(tmp_path / "r", {"one": fitted(data)}, data, {})
    with pytest.raises(InputError, match="no router 'two'; it has one"):
        load_folder(tmp_path / "r", ["two"])
    for name in ("../up", "seen", ""):
        with pytest.raises(InputError, match="cannot be the name of a router"):
            save_folder(tmp_path / "r", {name: fitted(data)}, data, {})
    for text, message in (
        ("{", "not JSON"),
        ("[]", "of version 1"),
        ('{"version": 9, "routers": ["one"]}', "of version 1"),
    ):
        (tmp_path / "r" / "manifest.json").write_text(text)
        with pytest.raises(CheckpointError, match=message):
            load_folder(tmp_path / "r")


@pytest.mark.parametrize("name", ["knn", "cluster", "ridge"])
def test_real_routers_are_read_back_to_the_bit(tmp_path, name):
    data = made_outcomes(80)
    embedder = Hashed(Hashed.Config(dim=64)).fit(data.query)
    data = data.with_vectors(embedder.embed(data.query))
    router = FittedRouter(strategy=strategies.make(name).fit(data), models=pool_of(MODELS).models, embedder=embedder)
    router.save(tmp_path / "r.safetensors")
    again = FittedRouter.load(tmp_path / "r.safetensors")
    assert same(router, again)
    assert again.route("add the numbers 3") == router.route("add the numbers 3")


def test_routers_take_the_place_of_routers_alone(tmp_path):
    data = made_outcomes(60)
    folder = tmp_path / "r"
    save_folder(folder, {"one": fitted(data)}, data, {})
    save_folder(folder, {"two": fitted(data)}, data, {})
    assert set(load_folder(folder).routers) == {"two"}
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match=r"holds thesis\.txt, which would be lost"):
        save_folder(folder, {"one": fitted(data)}, data, {})
    assert (folder / "thesis.txt").read_text() == "years of work"
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(DataError, match=r"has no manifest\.json"):
        save_folder(weights, {"one": fitted(data)}, data, {})
    assert (weights / "model.safetensors").read_bytes() == b"weights"


def test_a_folder_that_knows_letters_and_digits_alone_still_tells_what_it_learned_from(tmp_path):
    from anabranch.routers.wording import letters_and_digits

    data = made_outcomes(40)
    save_folder(tmp_path / "routers", {"one": fitted(data)}, data, {})
    forms = [letters_and_digits(text) for text in data.query]
    hashes = [int.from_bytes(hashlib.sha256(form.encode()).digest()[:8], "little") for form in forms]
    fitted_module._write(
        tmp_path / "routers" / fitted_module.SEEN, {"hash": np.array(sorted(hashes), np.uint64)}, {"version": 1}
    )
    found = load_folder(tmp_path / "routers")
    assert all(found.has_seen(text) for text in data.query)
    assert not found.has_seen("something else")


def without_record(path):
    """The file as versions wrote it that did not scale vectors."""
    tensors, content = fitted_module._read(path)
    del content["embedder"]["unit"]
    fitted_module._write(path, tensors, content)


class Knows(Embedder, kind="knows"):
    """Of an installed package: unit vectors all along, of the words it knows; or what a test wants of it."""

    dim, words, error = 4, ("add", "write", "fix", "a"), None

    def embed(self, texts):
        if Knows.error is not None:
            raise Knows.error
        found_ND = np.array([[text.split().count(word) for word in Knows.words] for text in texts], np.float32)
        return found_ND / np.maximum(np.linalg.norm(found_ND, axis=1, keepdims=True), 1e-9)


class Counts(Embedder, kind="counts"):
    """Of an installed package: counts of words, so that its vectors have any length."""

    dim = 8

    def embed(self, texts):
        found_ND = np.zeros((len(texts), 8), np.float32)
        for row, text in enumerate(texts):
            for word in text.split():
                found_ND[row, sum(map(ord, word)) % 8] += 3.0
        return found_ND


def scores(router):
    return {one.model: one.score for one in router.route("add the numbers 7").candidates}


def learned(name, embedder, place):
    data = made_outcomes(60)
    strategy = strategies.make(name).fit(data.with_vectors(unit_vectors(embedder, data.query)))
    router = FittedRouter(strategy=strategy, models=pool_of(MODELS).models, embedder=embedder)
    router.save(place)
    return router


def test_a_router_of_vectors_that_nobody_scaled_is_refused_unless_they_were_of_length_1_anyhow(tmp_path, monkeypatch):
    monkeypatch.setitem(BUILTIN["embedder"], "counts", f"{__name__}:Counts")
    place = tmp_path / "router.safetensors"
    for kind in ("ridge", "linucb", "knn"):
        router = learned(kind, Counts(Counts.Config()), place)
        assert scores(FittedRouter.load(place)) == pytest.approx(scores(router))
        without_record(place)
        with pytest.raises(CheckpointError, match=r"embedder 'counts' as they came.*fit it again") as caught:
            FittedRouter.load(place)
        assert "\n" not in str(caught.value)
        # Our own scale what they give.
        router = learned(kind, Hashed(Hashed.Config(dim=32)), place)
        without_record(place)
        assert scores(FittedRouter.load(place)) == pytest.approx(scores(router))
    # Of vectors that are not looked at, nothing is to be said.
    strategy = Ranked(Ranked.Config(predictor=WordMeans.Config())).fit(made_outcomes(60))
    models = pool_of(MODELS).models
    FittedRouter(strategy=strategy, models=models, embedder=Counts(Counts.Config())).save(place)
    without_record(place)
    assert FittedRouter.load(place).route("add the numbers 7").model


def test_a_router_of_an_embedder_of_others_that_gave_unit_vectors_all_along_is_taken(tmp_path, monkeypatch):
    """It is asked for a few texts, and for what the models are said to be good at, where it knows no word of ours."""
    monkeypatch.setitem(BUILTIN["embedder"], "knows", f"{__name__}:Knows")
    place, again = tmp_path / "router.safetensors", tmp_path / "again.safetensors"
    router = learned("ridge", Knows(Knows.Config()), place)
    without_record(place)
    read = FittedRouter.load(place)
    assert scores(read) == pytest.approx(scores(router))
    # From then on the file says so.
    read.save(again)
    assert fitted_module._read(again)[1]["embedder"]["unit"] is True
    for error in (RuntimeError("no GPU"), KeyError("x"), DataError("two\nlines")):
        monkeypatch.setattr(Knows, "error", error)
        with pytest.raises(
            CheckpointError, match=r"cannot be told, since it fails \(.*\): mend that, or fit"
        ) as caught:
            FittedRouter.load(place)
        assert "\n" not in str(caught.value)
    monkeypatch.setattr(Knows, "error", None)
    monkeypatch.setattr(Knows, "words", ("ajouter", "vers", "corriger", "un"))
    with pytest.raises(CheckpointError, match="fit it again"):
        FittedRouter.load(place)
    models = tuple(replace(model, description="ajouter des nombres") for model in router.models)
    replace(router, models=models).save(place)
    without_record(place)
    assert FittedRouter.load(place).models == models


def test_an_embedder_of_other_dimensions_is_refused_when_a_router_is_made_or_read(tmp_path, monkeypatch):
    """Every query was, and nobody knew before the first."""
    monkeypatch.setitem(BUILTIN["embedder"], "knows", f"{__name__}:Knows")
    place = tmp_path / "router.safetensors"
    router = learned("knn", Knows(Knows.Config()), place)
    other = Hashed(Hashed.Config(dim=32)).fit(["a b"])
    with pytest.raises(
        InputError, match=r"knn learned from vectors of 4 dimensions, and embedder 'hashed' gives 32; use"
    ):
        FittedRouter(strategy=router.strategy, models=router.models, embedder=other)
    monkeypatch.setattr(Knows, "dim", 5)
    with pytest.raises(CheckpointError, match="learned from vectors of 4 dimensions, and embedder 'knows' gives 5"):
        FittedRouter.load(place)
    # What looks at no vectors may stand beside any embedder.
    words = Ranked(Ranked.Config(predictor=WordMeans.Config())).fit(made_outcomes(60))
    assert FittedRouter(strategy=words, models=router.models, embedder=other).route("add 1").model
