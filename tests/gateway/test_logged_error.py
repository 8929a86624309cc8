"""What the log tells of an exception quotes nobody."""

import json

from anabranch.gateway.logged_error import raised


def test_the_text_of_an_exception_stays_out_and_its_place_is_told():
    try:
        json.loads("{a secret")
    except ValueError as error:
        told = raised(error)
    assert told.startswith("JSONDecodeError at decoder.py:")
    assert "secret" not in told


def test_an_exception_that_was_never_raised_has_no_place():
    assert raised(KeyError("a secret")) == "KeyError"
