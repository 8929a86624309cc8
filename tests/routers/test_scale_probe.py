"""The probe learns which words make steps hard, reads back to the bit, and is refused where it is none."""

import asyncio
import json

import numpy as np
import pytest

from anabranch.errors import CheckpointError, ConfigError, InputError
from anabranch.registry import BUILTIN, resolve
from anabranch.routers.embed import Embedder
from anabranch.routers.embed.hashed import Hashed
from anabranch.routers.logistic import sigmoid
from anabranch.routers.scale import Given, Probe, SelectiveReasoner
from anabranch.routers.strategies import make
from scale_scripted import Models, usual

TEXTS = ("add two numbers", "prove the conjecture", "add three numbers", "prove a hard lemma") * 5
RIGHT1, RIGHT2 = [1, 0, 1, 0] * 5, [1, 1, 1, 0] * 5
SMALL = Probe.Config(embedder=Hashed.Config(dim=32))


def test_it_tells_hard_words_from_easy_ones():
    probe = SMALL.build().fit(TEXTS, RIGHT1, RIGHT2)
    easy, hard = probe.predict(["add numbers", "prove a lemma"])
    assert easy.difficulty < 0.3 < 0.6 < hard.difficulty
    assert hard.p2 < easy.p2
    # By hand: a constant and the text's vector, through the logistic function.
    x_D = np.concatenate([[1.0], probe.embedder.embed(["add numbers"])[0]])
    assert easy.p1 == pytest.approx(float(sigmoid(x_D @ probe.theta1_D)))
    assert easy.difficulty == 1 - easy.p1
    # Of System 2 nothing is known: it has the chance that the config says, or System 1's.
    alone = SMALL.build().fit(TEXTS, RIGHT1).predict(["add numbers", "prove a lemma"])
    assert [one.p2 for one in alone] == [max(one.p1, 0.95) for one in alone]


def test_it_reads_back_and_runs(tmp_path):
    path = tmp_path / "probe.json"
    probe = SMALL.build().fit(TEXTS, RIGHT1, RIGHT2)
    probe.save(path)
    read = Probe.Config(path=str(path)).build()
    assert read.predict(TEXTS) == probe.predict(TEXTS)
    again = tmp_path / "again.json"
    read.save(again)
    assert again.read_bytes() == path.read_bytes()
    steps = Given.Config(steps=("add numbers", "prove a lemma", "done")).build()
    models = Models(usual())
    trace = asyncio.run(
        SelectiveReasoner(system1="small", system2="large", decomposer=steps, assessor=read).solve("why?", models)
    )
    assert [one.system for one in trace.steps] == [1, 2, 2]
    assert models.stages == ["solve", "solve", "last"]
    assert make("scale", assessor=read.config).config.assessor.path == str(path)


class Raw(Embedder, kind="raw"):
    """Of an installed package: counts of two letters, of length 1 where a test says so."""

    dim, is_unit = 2, False

    def embed(self, texts):
        found_ND = np.array([[text.count("a"), text.count("e")] for text in texts], np.float32)
        length_N1 = np.linalg.norm(found_ND, axis=1, keepdims=True) if Raw.is_unit else 1.0
        return found_ND / np.maximum(length_N1, 1e-9)


def test_a_probe_of_vectors_that_nobody_scaled_is_refused_unless_they_were_of_length_1_anyhow(tmp_path, monkeypatch):
    monkeypatch.setitem(BUILTIN["embedder"], "raw", f"{__name__}:Raw")
    path = tmp_path / "probe.json"
    for config, is_unit, message in (
        (Raw.Config(), False, "embedder 'raw' as they came.*fit it again"),
        (Raw.Config(), True, None),
        (Hashed.Config(dim=32), False, None),
    ):
        monkeypatch.setattr(Raw, "is_unit", is_unit)
        made = Probe.Config(embedder=config).build().fit(TEXTS, RIGHT1)
        made.save(path)
        table = json.loads(path.read_text())
        assert table.pop("unit") is True
        assert Probe.Config(path=str(path)).build().predict(TEXTS) == made.predict(TEXTS)
        # As versions wrote it that did not scale vectors.
        path.write_text(json.dumps(table))
        if message is None:
            assert Probe.Config(path=str(path)).build().predict(TEXTS) == made.predict(TEXTS)
        else:
            with pytest.raises(CheckpointError, match=message):
                Probe.Config(path=str(path)).build()
    resolve.cache_clear()


def test_what_it_does_not_learn_from():
    for right1, right2, message in (
        ([1], None, r"right1 has shape \[1\], and there are 20 steps"),
        (RIGHT1, [1], "right2 has shape"),
        ([2, *RIGHT1[1:]], None, "right1 has 2.0 among its judgements; each must be from 0 to 1"),
        ([float("nan"), *RIGHT1[1:]], None, "right1 has nan among its judgements"),
    ):
        with pytest.raises(InputError, match=message):
            SMALL.build().fit(TEXTS, right1, right2)
    with pytest.raises(InputError, match="there are 0 steps"):
        SMALL.build().fit([], [])
    with pytest.raises(InputError, match="has not learned yet"):
        SMALL.build().predict(["x"])
    with pytest.raises(InputError, match="nothing to save"):
        SMALL.build().save("nowhere.json")
    with pytest.raises(ConfigError, match="assessor has to learn first"):
        make("scale", assessor=SMALL)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 2; this program reads 1"),
        ({"theta1": [0.0]}, r"weights of shape \[1\], not 33 finite ones"),
        ({"theta1": [float("nan")] * 33}, "not 33 finite ones"),
        ({"theta1": "x"}, "cannot be read"),
        ({"arrays": {"idf_D": ["float64", [2], [1.0, 1.0]]}}, "of 2 buckets, not 32"),
        ({"arrays": {"idf_D": ["object", [2], [1.0]]}}, "cannot be read"),
        ({"embedder": {"kind": "none"}}, "cannot be read"),
        ({"facts": None, "arrays": None}, "cannot be read"),
    ],
)
def test_a_file_that_is_none_is_told(tmp_path, change, message):
    path = tmp_path / "probe.json"
    SMALL.build().fit(TEXTS, RIGHT1).save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError, match=message):
        Probe.Config(path=str(path)).build()


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b"\xff", b"5", b"[" * 99_999])
def test_bytes_that_are_none(tmp_path, data):
    path = tmp_path / "probe.json"
    path.write_bytes(data)
    for where in (path, tmp_path / "nowhere.json"):
        with pytest.raises(CheckpointError, match="cannot be read"):
            Probe.Config(path=str(where)).build()
