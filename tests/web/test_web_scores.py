"""Log probabilities of texts among those of all tokens: which they are, and that of many texts each is looked up."""

from functools import cached_property

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.web.responses import ResponseStream, scores
from anabranch.web.responses.scores import logprobs_beside_texts, logprobs_of_texts


def scored(*tokens):
    return [{"token": token, "logprob": -1.0, "bytes": list(token.encode())} for token in tokens]


class Counted(list):
    """A list that counts what is taken out of it."""

    taken = 0

    def __iter__(self):
        for one in super().__iter__():
            Counted.taken += 1
            yield one


@pytest.fixture
def counted(monkeypatch):
    monkeypatch.setattr(Counted, "taken", 0)
    for name in ("_begins", "_ends"):
        made = getattr(scores._Tokens, name).func
        noted = cached_property(lambda self, made=made: Counted(made(self)))
        noted.__set_name__(scores._Tokens, name)
        monkeypatch.setattr(scores._Tokens, name, noted)


@pytest.mark.parametrize("is_told_whole", [True, False])
def test_the_tokens_of_an_answer_of_many_texts_are_not_gone_through_for_each(counted, is_told_whole):
    """The work was that of all tokens for each text."""
    texts = [f"text {at} is" if is_told_whole else f"text {at}is" for at in range(200)]
    pieces = [one for text in texts for one in (("text", text), ("call", {}))]
    tokens = scored(*(token for at in range(200) for token in ("text ", f"{at} ", "is", "<call>")))
    found = logprobs_of_texts(pieces, tokens, thoughts="", is_refused=False)
    assert [[one["token"] for one in those] for those in found] == [["text ", f"{at} ", "is"] for at in range(200)]
    beside = logprobs_beside_texts(pieces, tokens, thoughts="")
    assert [one for those in beside for one in those] == tokens
    assert Counted.taken <= 4 * len(tokens)


@given(tokens=st.lists(st.text("ab ", max_size=3), max_size=8), data=st.data())
def test_those_between_two_places_have_something_there(tokens, data):
    made = scores._Tokens(scored(*tokens))
    begin, end = sorted(data.draw(st.lists(st.integers(0, made.size), min_size=2, max_size=2)))
    places = [(sum(map(len, tokens[:at])), len(token)) for at, token in enumerate(tokens)]
    wanted = [
        one
        for one, (at, size) in zip(made._logprobs, places, strict=True)
        if at + size > begin and (at < end or end == made.size)
    ]
    assert made.between(begin, end) == wanted


def test_those_that_are_held_until_a_text_comes_are_not_copied_for_each_piece_without_one():
    stream = ResponseStream({"model": "m"})
    list(stream.begin())
    given = [scored("", f"<{at}>") for at in range(50)]

    def add(delta, logprobs):
        choice = {"index": 0, "delta": delta, "logprobs": {"content": logprobs}}
        return list(stream.add({"choices": [choice]}))

    add({"content": ""}, given[0])
    held = stream._scores
    for one in given[1:]:
        add({"content": ""}, one)
        assert stream._scores is held
    assert held == [one for those in given for one in those]
    # What came is as it came.
    assert [len(one) for one in given] == [2] * 50
    add({"content": "".join(f"<{at}>" for at in range(50)) + "end"}, scored("end"))
    list(stream.end())
    [part] = stream.response["output"][0]["content"]
    assert [one["token"] for one in part["logprobs"] if one["token"]] == [f"<{at}>" for at in range(50)] + ["end"]
