"""Guesses from a text's own past: by hand, and against the rule in its plainest words."""

from hypothesis import given
from hypothesis import strategies as st

from anabranch.serving.core.lookup import MOST_PLACES, PromptLookup


def guess(tokens, most, ngram=3, allowed=None):
    return PromptLookup(ngram, allowed or max(most, 1)).guess(tokens, len(tokens), most)


def test_what_followed_the_last_time():
    assert guess([1, 2, 3, 4, 5, 9, 1, 2, 3], 2) == [4, 5]


def test_nothing_stood_before():
    assert guess([1, 2, 3], 4) == []
    assert guess([1], 4) == []


def test_nothing_is_asked_for():
    assert guess([1, 1, 1], 0) == []


def test_a_longer_match_goes_before_a_newer_one():
    # 7 8 stood at the beginning, 8 alone later.
    assert guess([7, 8, 1, 8, 2, 7, 8], 1) == [1]
    assert guess([7, 8, 1, 8, 2, 7, 8], 1, ngram=1) == [2]


def test_of_matches_of_one_length_the_newest():
    assert guess([5, 1, 5, 2, 5], 1) == [2]


def test_no_more_than_ngram_tokens_are_looked_up():
    # 1 2 3 4 stood first; of three tokens the newer place is as good.
    tokens = [1, 2, 3, 4, 10, 9, 2, 3, 4, 20, 1, 2, 3, 4]
    assert guess(tokens, 1, ngram=3) == [20]
    assert guess(tokens, 1, ngram=4) == [10]


def test_a_loop_is_guessed_beyond_the_end_of_the_text():
    assert guess([1, 2, 1, 2, 1], 5) == [2, 1, 2, 1, 2]
    assert guess([6, 6], 4) == [6, 6, 6, 6]


def test_what_follows_the_length_is_not_read():
    assert PromptLookup(3, 4).guess([1, 2, 1, -1], 3, 2) == [2, 1]


def test_a_text_that_grows_is_read_once():
    lookup, tokens = PromptLookup(2, 8), [1, 2, 3]
    assert lookup.guess(tokens, 3, 2) == []
    tokens += [1, 2]
    assert lookup.guess(tokens, 5, 2) == [3, 1]
    assert len(lookup._before) == 5


def test_only_so_many_places_are_looked_at():
    near = [1, 2, 9, *[5, 2] * (MOST_PLACES - 1), 1, 2]
    far = [1, 2, 9, *[5, 2] * MOST_PLACES, 1, 2]
    assert guess(near, 1, ngram=2) == [9]
    assert guess(far, 1, ngram=2) == [1]


def test_who_guesses_wrong_guesses_less_and_who_is_right_more_again():
    lookup, sizes = PromptLookup(1, 8), []
    for right in (0, 0, 0, 0, None, None, None, None, None):
        size = len(lookup.guess([1, 1], 2, 100))
        sizes.append(size)
        lookup.learn(size, size if right is None else right)
    assert sizes == [8, 4, 2, 1, 1, 2, 4, 8, 8]


def test_a_size_of_which_half_holds_is_kept():
    lookup = PromptLookup(1, 8)
    for right, size in ((4, 8), (3, 4), (2, 4), (1, 2), (1, 2), (0, 1)):
        lookup.learn(len(lookup.guess([1, 1], 2, 100)), right)
        assert len(lookup.guess([1, 1], 2, 100)) == size


def test_a_guess_that_was_cut_short_says_nothing_of_longer_ones():
    lookup = PromptLookup(1, 32)
    for guessed, right in ((32, 0), (16, 0), (1, 1)):
        lookup.learn(guessed, right)
    assert len(lookup.guess([1, 1], 2, 100)) == 8


def plainly(tokens, ngram, most):
    """Token by token: each goes on from the place that the first one was found at."""
    for count in range(min(ngram, len(tokens) - 1), 0, -1):
        places = [
            end for end in range(count - 1, len(tokens) - 1) if tokens[end - count + 1 : end + 1] == tokens[-count:]
        ]
        if places:
            text = list(tokens)
            for at in range(most):
                text.append(text[places[-1] + 1 + at])
            return text[len(tokens) :]
    return []


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 5), st.integers(1, 12), st.data())
def test_the_rule(tokens, ngram, most, data):
    lookup = PromptLookup(ngram, most)
    lengths = sorted(data.draw(st.lists(st.integers(1, len(tokens)), min_size=1, max_size=4)))
    for length in lengths:
        assert lookup.guess(tokens, length, most) == plainly(tokens[:length], ngram, most)
