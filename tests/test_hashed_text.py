"""Features of texts in buckets: what counts, and that it is the same in every process."""

import subprocess
import sys

import numpy as np

from anabranch.hashed_text import hashed_text

MANY = 2**31


def found(text, **options):
    return dict(zip(*(part.tolist() for part in hashed_text(text, MANY, **options)), strict=True))


def test_words_pairs_and_pieces_are_counted_apart():
    assert len(found("the cat", pairs=False)) == 2
    assert len(found("the cat")) == 3
    # " the", "the ", " cat", "cat "; a word of four letters is no piece of four.
    assert len(found("the cat", pieces=4)) == 7
    assert len(found("word", pairs=False, pieces=4)) == 1 + 3
    assert len(found("a", pairs=False, pieces=4)) == 2
    assert sorted(map(abs, found("The CAT, the cat!", pairs=False).values())) == [2, 2]
    assert not found("  ...  ", pieces=4)
    assert found("a b c d", pairs=False, max_words=2) == found("a b", pairs=False)
    assert set(found("the cat", pairs=False)) < set(found("the cat", pieces=4))


class Whole(str):
    """A text of which a part may be looked at, and not all."""

    __slots__ = ()

    def casefold(self):
        raise AssertionError("all of the text was looked at")


def test_of_a_long_text_no_more_is_looked_at_than_counts():
    """All words of a text of megabytes were made, under Python's lock, before the first 2,048 were kept."""
    assert found(Whole("the cat")) == found("the cat")
    assert found(Whole("a b " * 100_000), pieces=4) == found("a b " * 1024, pieces=4)
    # One word without an end counts by its beginning, and its pieces are no more than that has.
    assert found(Whole("ab" * 1_000_000), max_words=4, pieces=4) == found("ab" * 128, pieces=4)


def test_a_feature_has_one_sign_and_both_occur():
    values = found(" ".join(map(str, range(200))), pairs=False)
    signs = np.sign(list(values.values()))
    assert 60 < (signs > 0).sum() < 140
    assert all(found(str(number), pairs=False).items() <= values.items() for number in range(200))


def test_buckets_are_the_same_in_every_process():
    code = "from anabranch.hashed_text import hashed_text as h; print(h('Straße ひ a b', 1000, pieces=4)[0].tolist())"
    here = str(hashed_text("Straße ひ a b", 1000, pieces=4)[0].tolist())
    told = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(1)]
    assert [one.stdout.strip() for one in told] == [here]
