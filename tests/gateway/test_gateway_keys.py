"""Keys of upstreams: where they come from, and that they show themselves nowhere."""

import logging
import pickle

import pytest

from anabranch.config import to_dict
from anabranch.errors import ConfigError
from anabranch.gateway.providers.keys import PASSPHRASE, UpstreamKey, read_key, write_key
from anabranch.gateway.providers.openai import OpenAI

KEY = "sk-proj-0123456789abcdef"


@pytest.fixture
def passphrase(monkeypatch):
    pytest.importorskip("cryptography", reason="encrypted key files need the extra signatures")
    monkeypatch.setenv(PASSPHRASE, "correct horse")


def test_a_key_comes_from_the_environment_before_the_file(tmp_path, monkeypatch, passphrase):
    write_key(tmp_path / "k", KEY)
    assert read_key("NOT_SET", str(tmp_path / "k")).reveal() == KEY
    monkeypatch.setenv("SET", f" {KEY}2\n")
    assert read_key("SET", str(tmp_path / "k")).reveal() == KEY + "2"
    assert read_key(None, None) is None


def test_a_file_is_encrypted_private_and_read_with_its_passphrase_only(tmp_path, monkeypatch, passphrase):
    path = tmp_path / "k"
    write_key(path, KEY)
    assert KEY.encode() not in path.read_bytes()
    assert path.stat().st_mode & 0o077 == 0
    monkeypatch.setenv(PASSPHRASE, "wrong")
    with pytest.raises(ConfigError, match="cannot be decrypted"):
        read_key(None, str(path))
    monkeypatch.delenv(PASSPHRASE)
    with pytest.raises(ConfigError, match=f"{PASSPHRASE} is not set"):
        read_key(None, str(path))


def test_a_file_that_was_changed_is_not_read(tmp_path, passphrase):
    path = tmp_path / "k"
    write_key(path, KEY)
    whole = path.read_bytes()
    for at in (0, len(whole) // 4, len(whole) // 2, len(whole) - 9):  # the mark, the salt, the text, its seal
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(ConfigError) as caught:
            read_key(None, str(path))
        assert KEY not in str(caught.value)


@pytest.mark.parametrize("given", ["", "two words", "zwölf", "a\nb"])
def test_what_cannot_be_a_key_is_told_without_showing_it(monkeypatch, given):
    monkeypatch.setenv("SOME_KEY", given)
    with pytest.raises(ConfigError) as caught:
        read_key("SOME_KEY", None)
    assert "SOME_KEY" in str(caught.value)
    assert not given or given not in str(caught.value)


def test_plain_files_are_refused(tmp_path):
    (tmp_path / "k").write_text(KEY)
    with pytest.raises(ConfigError, match="no encrypted key file"):
        read_key(None, str(tmp_path / "k"))
    with pytest.raises(ConfigError, match="no key file"):
        read_key(None, str(tmp_path / "none"))


def test_a_key_shows_itself_nowhere(monkeypatch, caplog):
    monkeypatch.setenv("SOME_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    config = OpenAI.Config(model="m", key_env="SOME_KEY")
    provider = config.build()
    logging.getLogger("test").debug("%r %s %r", provider, config, to_dict(config))
    failure = provider.error(401, {}, f'{{"error":{{"message":"wrong key {KEY} or {KEY[:9]}*****"}}}}'.encode())
    assert KEY not in caplog.text + repr(UpstreamKey(KEY)) + str(UpstreamKey(KEY)) + failure.message
    with pytest.raises(TypeError, match="not written anywhere"):
        pickle.dumps(UpstreamKey(KEY))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"base_url": "ftp://x"}, "base_url"),
        ({"base_url": "file:///etc/passwd"}, "base_url"),
        ({"base_url": "http://u:p@x/v1"}, "password"),
        ({"headers": {"authorization": "Bearer x"}}, "set by the gateway"),
        ({"headers": {"x-a": "b\r\nhost: evil"}}, "printable"),
        ({"headers": {"x\r\na": "b"}}, "letters"),
    ],
)
def test_a_config_can_smuggle_neither_hosts_nor_headers(fields, message):
    with pytest.raises(ConfigError, match=message):
        OpenAI.Config(model="m", key_env=None, **fields)
