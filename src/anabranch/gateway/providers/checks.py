"""The contract of providers: what every one, ours and anyone's, must do. `anabranch.testing` gives it out as ``check_provider``.

    from anabranch.testing import check_provider

    def test_contract(monkeypatch):
        monkeypatch.setenv("MY_KEY", "secret-0123456789")
        check_provider(MyProvider.Config(model="m"), secret="secret-0123456789", answer=RECORDED, text="hello")

Nothing is sent anywhere. Each check raises AssertionError that says what is broken.
"""

import copy
import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any, get_args
from urllib.parse import urlsplit

from anabranch.bounds import is_whole
from anabranch.config import from_dict, to_dict
from anabranch.gateway.providers.provider import Endpoint, FailureKind, Provider, UpstreamError, UpstreamRequest

GARBAGE = (b"", b"null", b"[]", b'{"choices":', b"<!doctype html><p>oops", b"\xff\xfe\x00", b"[" * 100_000)
STATUSES = (300, 400, 401, 402, 403, 404, 408, 409, 413, 422, 429, 500, 502, 503, 529)
WANTED: dict[int, FailureKind] = {
    401: "auth",
    402: "credit",
    408: "timeout",
    429: "rate_limit",
    500: "server",
    503: "server",
}
BODIES: dict[Endpoint, dict[str, Any]] = {
    "chat": {"model": "theirs", "messages": [{"role": "user", "content": "hello \N{SNOWMAN}"}], "max_tokens": 5},
    "completions": {"model": "theirs", "prompt": "hello", "max_tokens": 5},
    "embeddings": {"model": "theirs", "input": ["hello"]},
    "images": {"model": "theirs", "prompt": "a river", "n": 1},
    "moderations": {"model": "theirs", "input": "hello"},
    "rerank": {"model": "theirs", "query": "hello", "documents": ["a", "b"]},
}


def check_provider(
    config: Provider.Config,
    *,
    secret: str | None = None,
    answer: bytes | None = None,
    text: str | None = None,
    events: Sequence[bytes] = (),
) -> None:
    """Put a provider through its paces.

    Args:
        config: of the provider; the environment holds what it needs.
        secret: the key that it uses, to see that it is not shown; None if it has none.
        answer: body of a whole answer of this upstream to a chat request.
        text: what that says.
        events: data of the events of a stream of this upstream, from the first to the last, for a provider that translates.

    Raises AssertionError.
    """
    provider: Provider = config.build()
    again = from_dict(type(config), json.loads(json.dumps(to_dict(config))))
    assert again == config, f"the config does not come back from JSON: {again} for {config}"
    assert not secret or secret not in repr(provider) + repr(config), "repr shows the key"
    _check_context(provider)
    assert provider.endpoints, "a provider serves at least one endpoint"
    for endpoint in _checked(provider):
        for stream in (False, True):
            _check_build(provider, endpoint, stream, secret)
    _check_refusals(provider)
    _check_errors(provider, secret)
    _check_garbage(provider)
    if answer is not None:
        _check_answer(provider, answer, text)
    if events:
        _check_stream(provider, events)


def _checked(provider: Provider) -> list[Endpoint]:
    """Endpoints that are asked and answer in JSON; of the others there is nothing to be read."""
    return [endpoint for endpoint in provider.endpoints if endpoint in BODIES]


def _request(endpoint: Endpoint, stream: bool = False) -> UpstreamRequest:
    body = copy.deepcopy(BODIES[endpoint])
    return UpstreamRequest(endpoint, body | ({"stream": True} if stream else {}), request_id="req_1")


def _check_build(provider: Provider, endpoint: Endpoint, stream: bool, secret: str | None) -> None:
    where = f"build of {endpoint}{', streamed' if stream else ''}"
    request = _request(endpoint, stream)
    before = copy.deepcopy(request.body)
    call, other = provider.build(request), provider.build(request)
    assert request.body == before, f"{where} changes the sender's body, which other providers get as well"
    assert (call.url, dict(call.headers), call.body) == (other.url, dict(other.headers), other.body), (
        f"{where} is not pure"
    )
    assert not secret or secret.encode() not in call.body, f"{where}: the key is in the body, where it may be logged"
    assert not secret or secret not in call.url, f"{where}: the key is in the URL, where it may be logged"
    assert not secret or secret not in repr(call), f"{where}: repr of the call shows the key"
    assert isinstance(json.loads(call.body), dict), f"{where}: the body is no JSON object"
    for name, value in call.headers.items():
        assert not set("\r\n\0") & set(f"{name}{value}"), f"{where}: header {name!r} holds a line break"
    own = provider.transport(_Nowhere()) is not _NOWHERE
    assert own or urlsplit(call.url).scheme in ("http", "https"), f"{where}: {call.url!r} is no absolute URL"


def _check_refusals(provider: Provider) -> None:
    for endpoint in BODIES:
        if endpoint in provider.endpoints:
            continue
        kind = _refused(lambda endpoint=endpoint: provider.build(_request(endpoint)))  # type: ignore[misc]
        told = "is built" if kind is None else f"is {kind!r}"
        assert kind == "unsupported", (
            f"a request to {endpoint}, which is none of its endpoints, {told}; it must be 'unsupported'"
        )


class _Nowhere:
    """A transport that is never used."""

    def __new__(cls) -> "_Nowhere":
        return _NOWHERE

    async def open(self, call: Any) -> Any:
        raise AssertionError("the contract sends nothing")


_NOWHERE: _Nowhere = object.__new__(_Nowhere)


def _check_context(provider: Provider) -> None:
    try:
        context = provider.context
    except Exception:
        # It may be known only once it has started, which takes more than there is here.
        return
    assert context is None or (is_whole(context) and context > 0), (
        f"context is {context!r}; it must be a whole number of tokens, at least 1, or None"
    )


def _check_errors(provider: Provider, secret: str | None) -> None:
    told = json.dumps({"error": {"message": f"no: {secret or 'x'}", "type": "oops", "code": None}}).encode()
    for status in STATUSES:
        for body in (*GARBAGE, told):
            failure = provider.error(status, {"retry-after": "7"}, body)
            where = f"error of status {status} and {body[:30]!r}"
            assert failure.kind in get_args(FailureKind), (
                f"{where}: kind {failure.kind!r} is none of {get_args(FailureKind)}"
            )
            assert failure.message, f"{where} says nothing"
            # By it is told whether the call may be billed.
            assert failure.status in (None, status), (
                f"{where} has status {failure.status!r}; it must be that of the answer"
            )
            assert not secret or secret not in failure.message, f"{where}: the message shows the key"
            json.dumps(dataclasses.asdict(failure))
            wanted = WANTED.get(status)
            assert wanted in (None, failure.kind), f"{where} is {failure.kind!r}; it must be {wanted!r}"
    assert provider.error(429, {"retry-after": "7"}, b"").retry_after_s == 7, "Retry-After of a 429 is not taken over"


def _check_garbage(provider: Provider) -> None:
    for endpoint in _checked(provider):
        for body in GARBAGE:
            kind = _refused(lambda body=body, endpoint=endpoint: provider.parse(_request(endpoint), body))  # type: ignore[misc]
            assert kind is not None, f"{body[:30]!r} is taken for an answer of {endpoint}"
            # What is nested without end may be too much to be read.
            assert kind in ("garbage", "excess"), f"{body[:30]!r} is {kind!r}; it must be 'garbage' or 'excess'"


def _refused(read: Callable[[], Any]) -> str | None:
    """The kind of failure that reading gives; None if it is read."""
    try:
        read()
    except UpstreamError as error:
        return error.failure.kind
    return None


def _check_answer(provider: Provider, answer: bytes, text: str | None) -> None:
    found = provider.parse(_request("chat"), answer)
    assert text is None or found.text == text, f"the answer says {found.text!r}; it must be {text!r}"
    assert found.finish_reason, "the answer does not say why it ended"
    assert found.usage.prompt > 0, "no prompt tokens are counted"
    assert isinstance(json.loads(found.data)["choices"], list), "the answer is not in OpenAI's form"


def _check_stream(provider: Provider, events: Sequence[bytes]) -> None:
    translator = provider.translator(_request("chat", stream=True))
    assert translator is not None, "events are given, but the provider passes streams on as they are"
    chunks = [chunk for data in events for chunk in translator.feed(data)]
    assert translator.is_done, "the stream is over, and the translator does not say so"
    choices = [choice for chunk in chunks for choice in chunk.get("choices") or ()]
    assert choices, "a stream without a choice"
    assert all("delta" in choice for choice in choices), "a chunk is not in OpenAI's form"
    assert any(choice.get("finish_reason") for choice in choices), "no chunk says why the answer ended"
    other = provider.translator(_request("chat", stream=True))
    assert other is not translator, "each stream needs a translator of its own"
    assert other is not None, "the second stream has no translator"
    kind = _refused(lambda: list(other.feed(b"\xff not json")))
    assert kind == "garbage", f"a broken event is {kind!r}; it must be 'garbage'"
