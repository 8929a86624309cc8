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
