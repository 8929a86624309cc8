import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import InputError
from anabranch.serving.core.text import Detokenizer, StopMatcher, TextStream
from tokenizers_of_every_make import ALL, LOSSLESS, by_name, lossless, unicode_text


class Characters:
    """A tokenizer of nothing but `decode`: each id is a character."""

    def decode(self, ids):
        return "".join(map(chr, ids))


def pieces_of(tokenizer, ids):
    decoder = Detokenizer(tokenizer)
    return [decoder.push(token) for token in ids] + [decoder.flush()]


@by_name
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_pieces_joined_are_the_text(name, data):
    tokenizer = ALL[name]
    ids = tokenizer.encode(data.draw(unicode_text))
    for _ in range(data.draw(st.integers(0, 3))):  # special tokens show as nothing, wherever they are
        ids.insert(data.draw(st.integers(0, len(ids))), tokenizer.eos_id)
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)


@lossless
@given(data=st.data())
def test_pieces_of_any_ids_joined_are_the_text(name, data):
    tokenizer = LOSSLESS[name]
    ids = data.draw(st.lists(st.integers(-1, tokenizer.vocab_size), max_size=40))
    assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids)


@settings(deadline=None)
@given(st.lists(st.sampled_from([0, 1, 2, *range(259, 290)]), max_size=40))
def test_blanks_of_words_are_kept_behind_any_token(ids):
    llama = ALL["llama"]
    ids = [token for token in ids if token < llama.vocab_size]
    assert "".join(pieces_of(llama, ids)) == llama.decode(ids)


@by_name
def test_no_piece_ends_inside_a_character(name):
    tokenizer = ALL[name]
    text = "日本語 🎉 naïve"
    for piece in pieces_of(tokenizer, tokenizer.encode(text)):
        assert "\ufffd" not in piece


def test_an_unfinished_character_shows_at_the_end():
    assert pieces_of(ALL["bytes"], list("é".encode()[:1])) == ["", "\ufffd"]
    llama = ALL["llama"]
    ids = llama.encode("aé")[:-1]
    assert "".join(pieces_of(llama, ids)) == "a\ufffd"


def test_broken_characters_do_not_hold_the_text_back():
    llama = ALL["llama"]
    decoder = Detokenizer(llama)
    byte = llama._id_of("<0xE2>")
    pieces = [decoder.push(byte) for _ in range(40)]
    assert sum(map(len, pieces)) >= 34
    assert "".join(pieces) + decoder.flush() == llama.decode([byte] * 40)


def test_a_replacement_character_of_the_text_itself_is_shown():
    text = "a\ufffdb\ufffd\ufffd\ufffd\ufffd\ufffd\ufffdc\ufffd"
    assert "".join(pieces_of(Characters(), list(map(ord, text)))) == text


def test_a_token_costs_the_same_wherever_it_is():
    class Counting:
        decoded = 0

        def decode(self, ids):
            self.decoded += len(ids)
            return " ".join(f"w{token}" for token in ids)

    tokenizer = Counting()
    assert "".join(pieces_of(tokenizer, range(4000))) == tokenizer.decode(range(4000))
    assert tokenizer.decoded < 4000 + 5 * 4000
    silent = Counting()
    silent.decode = lambda ids: setattr(silent, "decoded", silent.decoded + len(ids)) or ""
    assert "".join(pieces_of(silent, range(4000))) == ""
    assert silent.decoded < 70 * 4000


def naive(text, stops, include_stop):
    """The shortest beginning that ends with a stop string, without it; the longest such string."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end if include_stop else end - len(stop)], stop
    return text, None


def safe(text, stops):
    """What may be shown of a text that goes on: all but its longest end that a stop string begins with."""
    for start in range(len(text)):
        if any(stop.startswith(text[start:]) for stop in stops):
            return text[:start]
    return text


few = st.text("ab", min_size=1, max_size=6)


@settings(max_examples=400)
@given(st.lists(st.text("abc", max_size=5), max_size=8), st.lists(few, min_size=1, max_size=4), st.booleans())
def test_stops_are_found_as_by_looking_at_the_whole_text(pieces, stops, include_stop):
    matcher = StopMatcher(stops, include_stop=include_stop)
    shown, seen = "", ""
    for piece in pieces:
        out = matcher.push(piece)
        shown, seen = shown + out, seen + piece
        text, stop = naive(seen, stops, include_stop)
        assert matcher.stopped_by == stop
        # No more and no less than can be said: held back is exactly what may still become a stop string.
        assert shown == (text if stop else safe(seen, stops))
    shown += matcher.flush()
    assert (shown, matcher.stopped_by) == naive(seen, stops, include_stop)


@settings(max_examples=200, deadline=None)
@given(st.text("ab€", max_size=20), st.lists(st.text("ab€", min_size=1, max_size=4), max_size=3), st.data())
def test_streams_stop_across_tokens(text, stops, data):
    tokenizer = LOSSLESS["bytes"]
    ids, include_stop = tokenizer.encode(text), data.draw(st.booleans())
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=5)))
    stream = TextStream(tokenizer, stops, include_stop=include_stop)
    shown, is_stopped = "", False
    for start, end in zip([0, *cuts], [*cuts, len(ids)], strict=True):
        delta, is_stopped = stream.push(ids[start:end])
        shown += delta
    shown += stream.flush()
    expected, stop = naive(text, stops, include_stop)
    assert (shown, stream.stopped_by, is_stopped) == (expected, stop, stop is not None)
    if stop:  # the token with the last byte of the stop string is the last that counts
        end = expected if include_stop else expected + stop
        assert stream.num_tokens == len(end.encode())
        assert stream.push([97]) == ("", True)
        assert stream.flush() == ""
    else:
        assert stream.num_tokens == len(ids)


def test_a_broken_end_can_complete_a_stop_string():
    stream = TextStream(LOSSLESS["bytes"], ["x\ufffd"])
    assert stream.push(b"ax\xe2") == ("a", False)
    assert stream.flush() == ""
    assert stream.stopped_by == "x\ufffd"


def test_long_stop_strings_cost_no_more():
    stop = "a" * 20_000 + "b"
    matcher = StopMatcher([stop])
    shown = "".join(matcher.push("a") for _ in range(200)) + matcher.push("a" * 50_000)
    assert shown == "a" * 30_200
    assert matcher.push("b") == ""
    assert matcher.stopped_by == stop


@pytest.mark.parametrize("stop", ["abc", ["a", ""]])
def test_stops_must_be_a_list_of_strings_with_something_in_them(stop):
    with pytest.raises(InputError, match="stop is"):
        StopMatcher(stop)
