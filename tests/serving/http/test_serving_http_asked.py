"""One request as what answers it sees it, whatever it came by."""

import asyncio
import json
import logging

import pytest
from aiohttp import web

from anabranch.errors import InputError
from anabranch.serving.http.asked import LONG_CHARACTERS, Asked, answered
from anabranch.serving.http.config import HttpConfig, Limits
from anabranch.web.answer_room import AnswerRoom
from anabranch.web.api_error import ApiError
from anabranch.web.turns import Turns


class Apart:
    """Notes what is done in a thread."""

    def __init__(self):
        self.calls = []

    async def __call__(self, key, work, *arguments):
        self.calls.append((key, *arguments[1:]))
        return work(*arguments)


def asked(apart=None, **fields):
    return Asked(HttpConfig(**fields), apart or Apart(), Turns(), AnswerRoom(100, 0.5, 429), "req-1", "team")


def parsed(raw, most_tokens=0, **limits):
    apart = Apart()
    found = asyncio.run(asked(apart, limits=Limits(**limits)).parsed(raw, most_tokens))
    return found, apart.calls


def test_a_short_body_is_read_at_once_and_a_long_one_in_a_thread_within_its_limits():
    assert parsed(b'{"a": 1}') == ({"a": 1}, [])
    long = json.dumps({"a": "x" * LONG_CHARACTERS}).encode()
    found, calls = parsed(long, 7, body_values=1_025, body_parts=1_026)
    assert (found, calls) == (json.loads(long), [("team", 1_025, 1_026)])
    many = json.dumps({"a": [0] * LONG_CHARACTERS}).encode()
    with pytest.raises(ApiError, match="values"):
        parsed(many, body_values=1_024)
    # There is room for the ids of tokens that a prompt may have.
    assert len(parsed(many, LONG_CHARACTERS, body_values=1_024)[0]["a"]) == LONG_CHARACTERS


def test_fields_that_nobody_knows_are_told_with_what_they_may_be():
    one = asked()
    one.warn((), ["seed"])
    assert one.headers == {"x-request-id": "req-1"}
    one.warn(("sed", "Grün\n"), ["seed", "stop"])
    assert one.headers["x-warning"] == "ignored unknown fields: Gr?n?, sed (did you mean seed?)"
    one.warn(tuple(f"odd{at}" for at in range(12)), ["seed"])
    assert one.headers["x-warning"].endswith("and 2 more")
    with pytest.raises(ApiError) as caught:
        asked(strict=True).warn(("sed",), ["seed"])
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, "unknown_parameter", "sed")


def test_what_is_left_of_its_time():
    assert asked(limits=Limits(deadline_s=None)).left_s() is None
    one = asked(limits=Limits(deadline_s=5.0))
    one.began -= 7
    assert -3 < one.left_s() < -1


def outcome(error, caplog=None):
    one = asked()

    async def fails():
        raise error

    response = asyncio.run(answered(one, fails(), "POST /v1/x"))
    assert response.headers["x-request-id"] == "req-1"
    return response.status, json.loads(response.body)["error"]["code"], one.facts["error"]


def test_errors_are_answers_in_openais_form(caplog):
    async def well():
        return web.Response(status=204)

    assert asyncio.run(answered(asked(), well(), "x")).status == 204
    assert outcome(ApiError(429, "busy", "later")) == (429, "busy", "busy")
    assert outcome(InputError("seed is 'x'")) == (400, "invalid_value", "invalid_value")
    with caplog.at_level(logging.ERROR):
        assert outcome(ZeroDivisionError("secret")) == (500, "internal_error", "internal_error")
    assert "a bug: POST /v1/x" in caplog.text


@pytest.mark.parametrize("error", [asyncio.CancelledError, ConnectionResetError])
def test_who_has_gone_is_answered_nothing(error):
    async def fails():
        raise error

    async def main():
        with pytest.raises(error):
            await answered(asked(), fails(), "x")

    asyncio.run(main())


def test_what_an_answer_holds_counts_until_it_is_closed():
    one = asked()
    one.hold(0)
    one.begin_reading()
    one.close()
    one.hold(40)
    one.hold(20)
    assert one._answers.num_bytes == 60
    one.begin_reading()
    with pytest.raises(ApiError) as caught:
        one.hold(50)
    assert caught.value.code == "over_limit"
    one.close()
    one.close()
    assert one._answers.num_bytes == 0
