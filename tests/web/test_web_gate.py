"""Who may reach a server of this machine, by the headers alone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.web.api_error import ApiError
from anabranch.web.gate import Gate
from anabranch.web.senders import is_meant, is_same_origin


def said(gate, **headers):
    """The code of the refusal; None if there is none."""
    try:
        gate.check(headers)
    except ApiError as error:
        return f"{error.code}" if error.status == 403 else f"{error.status}"
    return None


@pytest.mark.parametrize(
    ("host", "is_ours"),
    [
        ("localhost", True),
        ("LOCALHOST.:80", True),
        ("app.localhost", True),
        ("127.0.0.1:8080", True),
        ("127.9.9.9", True),
        ("[::1]:80", True),
        ("gateway.example", True),
        ("Gateway.Example:80", True),
        ("page.example", False),
        ("localhost.page.example", False),
        ("192.168.0.1", False),
        ("0.0.0.0", False),
        ("127.0.0.1.page.example", False),
        ("page.example@127.0.0.1.evil", False),
        ("", False),
        ("[", False),
        ("localhost:", True),
        ("[::1]", True),
        ("::1", False),
        # Whatever a URL may have besides a name and a port.
        ("localhost#.page.example", False),
        ("localhost?.page.example", False),
        ("localhost/.page.example", False),
        ("localhost\\.page.example", False),
        ("page.example@127.0.0.1", False),
        ("a@127.0.0.1:80", False),
        ("localhost, page.example", False),
        ("localhost page.example", False),
        (" localhost", False),
        ("localhost\t", False),
        ("[::1", False),
        ("[127.0.0.1]", False),
        ("[localhost]", False),
        ("[::1]page.example", False),
        ("localhost:80:80", False),
        ("localhost:x", False),
        ("localhost:-1", False),
        ("localhost:65536", False),
        ("localhost:" + "1" * 5000, False),
    ],
)
def test_names_of_this_machine(host, is_ours):
    assert is_meant(host, ("gateway.example",)) is is_ours


@pytest.mark.parametrize(
    ("origin", "host", "is_own"),
    [
        (None, "", True),
        ("http://localhost:7", "localhost:7", True),
        ("HTTP://LocalHost:7", "localhost:7", True),
        ("http://localhost:8", "localhost:7", False),
        ("null", "localhost:7", False),
        ("http://page.example", "localhost:7", False),
        ("", "localhost", False),
        ("http://localhost", "localhost:80", False),
    ],
)
def test_pages_of_the_server_itself(origin, host, is_own):
    assert is_same_origin(origin, host) is is_own


@given(st.text(min_size=1, max_size=20) | st.text(".:0369a", min_size=1, max_size=7))
def test_what_follows_a_name_of_this_machine_is_a_port_or_makes_another_name(text):
    dots, colon, port = text.partition(":")
    is_port = not port or (port.isascii() and port.isdigit() and int(port) <= 65_535)
    if not is_port or dots.strip("."):
        assert not is_meant(f"localhost{text}")
    elif not dots and (port or not colon):
        assert is_meant(f"localhost{text}")


@given(st.text(alphabet=st.characters(exclude_characters="."), min_size=1, max_size=20))
def test_what_stands_before_a_name_of_this_machine_makes_another_name(text):
    assert not is_meant(f"{text}localhost")
    assert not is_meant(f"{text}[::1]")


@pytest.mark.parametrize("kind", ["aiohttp", "starlette"])
def test_a_header_that_is_there_twice_is_no_origin_and_no_host(kind):
    def headers(*pairs):
        if kind == "starlette":
            return pytest.importorskip("starlette.datastructures").Headers(
                raw=[(one.encode(), other.encode()) for one, other in pairs]
            )
        return pytest.importorskip("multidict").CIMultiDictProxy(pytest.importorskip("multidict").CIMultiDict(pairs))

    gate, ours = Gate("127.0.0.1", (), ()), ("host", "localhost:7")
    page, own = ("origin", "http://page.example"), ("origin", "http://localhost:7")
    for pairs, code in (
        ([ours], None),
        ([ours, own], None),
        ([ours, own, page], "forbidden_origin"),
        ([ours, page, own], "forbidden_origin"),
        ([ours, ("host", "page.example"), own], "forbidden_host"),
        ([own], "forbidden_host"),
    ):
        try:
            gate.check(headers(*pairs))
            found = None
        except ApiError as error:
            found = error.code
        assert found == code, pairs


def test_a_gate_is_closed_on_loopback_alone():
    for host in ("127.0.0.1", "localhost", "::1"):
        gate = Gate(host, (), ())
        assert said(gate, host="page.example") == "forbidden_host"
        assert said(gate, host="localhost:7", origin="http://page.example") == "forbidden_origin"
        assert said(gate) == "forbidden_host"
        assert said(gate, host="localhost:7", origin="http://localhost:7") is None
    for open_one in (Gate("0.0.0.0", (), ()), Gate("127.0.0.1", ("*",), ())):
        assert said(open_one, host="page.example", origin="http://page.example") is None


def test_what_a_gate_lets_through_is_said():
    gate = Gate("127.0.0.1", ("Proxy.Example",), ("https://app.example",), "http.")
    assert said(gate, host="proxy.example:80", origin="https://app.example") is None
    assert said(gate, host="proxy.example", origin="https://other.example") == "forbidden_origin"
    # Any page, but by no name of its own.
    assert said(Gate("127.0.0.1", (), ("*",)), host="localhost", origin="null") is None
    assert said(Gate("127.0.0.1", (), ("*",)), host="page.example", origin="null") == "forbidden_host"
    with pytest.raises(ApiError, match=r"not for the host other\.example; http\.hosts allows names"):
        gate.check({"host": "other.example"})
    with pytest.raises(ApiError, match=r"http\.cors_origins allows them"):
        gate.check({"host": "localhost", "origin": "http://page.example"})
