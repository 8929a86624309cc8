"""Texts parted before rows are cut from them."""

import random

from hypothesis import given
from hypothesis import strategies as st

from anabranch.studies.apart import RUN, parted, runs_of


def test_texts_that_share_a_run_are_on_one_side():
    texts = [tuple(range(100 * n, 100 * n + 40)) for n in range(30)]
    # A chain: the first and the last share nothing.
    texts[1] += texts[0][3:19]
    texts[2] += texts[1][:16]
    # A token less is a turn of phrase.
    texts[3] += texts[4][:15]
    apart = set()
    for seed in range(40):
        fitted, judged = parted(texts, random.Random(seed))
        assert sorted(fitted + judged) == texts
        assert fitted
        assert 0 < sum(map(len, judged)) <= sum(map(len, texts)) / 3
        assert len({text in judged for text in texts[:3]}) == 1
        apart.add((texts[3] in judged) == (texts[4] in judged))
    assert apart == {True, False}


@given(texts=st.lists(st.lists(st.integers(0, 1), max_size=RUN + 6).map(tuple), max_size=12), seed=st.integers(0, 5))
def test_every_text_is_on_one_side_and_no_run_on_both(texts, seed):
    fitted, judged = parted(texts, random.Random(seed))
    assert sorted(fitted + judged) == sorted(texts)
    sides = [set().union(*map(runs_of, side)) for side in (fitted, judged)]
    assert not sides[0] & sides[1]
    assert sum(map(len, judged)) <= sum(map(len, texts)) / 3


def test_runs_of_sixteen_or_all_of_fewer():
    assert runs_of(range(17)) == {tuple(range(16)), tuple(range(1, 17))}
    assert runs_of((1, 2)) == {(1, 2)}
    assert runs_of(()) == {()}
