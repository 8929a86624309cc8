import json

import pytest

from anabranch.cli.options import sampling_of
from anabranch.data import ByteTokenizer
from anabranch.lm import Decoder, save_model
from anabranch.lm.generation_defaults import generation_defaults
from anabranch.serving.core.client import EngineInfo
from anabranch.serving.http.generation_request import read_chat, read_completion
from anabranch.serving.http.reading import Reader
from anabranch.web.api_error import ApiError


@pytest.fixture
def folder(tmp_path):
    save_model(tmp_path / "model", Decoder.Config(vocab_size=257, dim=16, num_layers=1).build(), ByteTokenizer())
    return tmp_path / "model"


def say(folder, **table):
    (folder / "generation_config.json").write_text(json.dumps(table))


def test_what_makers_say(folder):
    assert generation_defaults(folder) == {}
    said = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.01, "repetition_penalty": 1.05}
    say(folder, **said, do_sample=True, max_new_tokens=99, eos_token_id=[1, 2])
    assert generation_defaults(folder) == said
    say(folder, **said, do_sample=False)
    assert generation_defaults(folder) == {**said, "temperature": 0.0}
    say(folder, temperature=None, top_p=1.0)
    assert generation_defaults(folder) == {"top_p": 1.0}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1),
        ("temperature", "hot"),
        ("top_p", 0),
        ("top_p", True),
        ("top_k", 2.5),
        ("repetition_penalty", 0),
    ],
)
def test_what_cannot_be_is_left_out_and_said(folder, name, value, caplog):
    say(folder, min_p=0.1, **{name: value})
    assert generation_defaults(folder) == {"min_p": 0.1}
    assert f"{name} in {folder / 'generation_config.json'} is {value!r}, which cannot be" in caplog.text
    (folder / "generation_config.json").write_text("{")
    assert generation_defaults(folder) == {}


def test_users_come_first_then_makers_then_the_usual(folder):
    usual = {"temperature": 0.8}
    asked = {"temperature": None, "top_k": None, "top_p": None}
    assert sampling_of(str(folder), asked, usual) == usual
    say(folder, temperature=0.6, top_k=0, top_p=0.95, min_p=0.2)
    assert sampling_of(str(folder), asked, usual) == {"temperature": 0.6, "top_p": 0.95}
    assert sampling_of(str(folder), {**asked, "temperature": 0.0, "top_k": 3}, usual) == {
        "temperature": 0.0,
        "top_k": 3,
        "top_p": 0.95,
    }


def test_requests_take_them_where_they_say_nothing(folder):
    say(folder, temperature=0.6, top_k=20, min_p=0.02, repetition_penalty=1.1)
    reader = Reader(ByteTokenizer(), generation_defaults(folder))
    info = EngineInfo(model="m", vocab_size=257, max_positions=100, block_tokens=4, num_blocks=10)
    chat = {"messages": [{"role": "user", "content": "hi"}], "temperature": None}
    for body, read in (({"model": "m", **chat}, read_chat), ({"model": "m", "prompt": "hi"}, read_completion)):
        sampling = read(body, reader, info, 8).sampling
        assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.6, 20, 1.0)
        assert (sampling.min_p, sampling.repetition_penalty) == (0.02, 1.1)
        own = read({**body, "temperature": 0, "top_k": 0, "min_p": 0}, reader, info, 8).sampling
        assert (own.temperature, own.top_k, own.min_p, own.repetition_penalty) == (0, 0, 0, 1.1)
    with pytest.raises(ApiError, match="temperature"):
        read_completion({"model": "m", "prompt": "hi", "temperature": 3}, reader, info, 8)
