"""`Pooling`: which rows are pooled, sums over the steps of a prompt, and what is forgotten."""

import pytest
import torch

from anabranch.serving.core.batch import Chunk
from anabranch.serving.engine.pool import Pooling


def chunk(id, count, start=0, *, pooling, is_whole):
    return Chunk(
        id=id, tokens=(1,) * count, start=start, blocks=(0,), samples=False, pooling=pooling, is_whole=is_whole
    )


def test_rows_are_all_of_a_mean_and_the_last_one_of_a_whole_prompt():
    chunks = [
        chunk("a", 2, pooling="mean", is_whole=False),
        chunk("b", 3, pooling="last", is_whole=False),
        chunk("c", 2, pooling="last", is_whole=True),
        chunk("d", 1, pooling=None, is_whole=True),
    ]
    assert Pooling.rows(chunks) == [0, 1, 6]


def test_a_mean_goes_on_where_the_step_before_ended_once_that_has_run():
    pooling = Pooling()
    first = pooling.of(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), [chunk("a", 2, pooling="mean", is_whole=False)])
    assert first.done == {}
    pooling.keep(first)
    last = chunk("a", 1, start=2, pooling="mean", is_whole=True)
    # (1 + 3 + 5) / 3 and (2 + 4 + 0) / 3; a step that failed and is run again has added nothing.
    for _ in range(2):
        assert pooling.of(torch.tensor([[5.0, 0.0]]), [last]).done["a"].embedding == (3.0, 2.0)
    pooling.forget("a")
    with pytest.raises(KeyError):
        pooling.of(torch.tensor([[5.0, 0.0]]), [last])


def test_a_vector_that_is_not_finite_fails_alone():
    chunks = [chunk(id, 1, pooling="last", is_whole=True) for id in "ab"]
    done = Pooling().of(torch.tensor([[1.0, float("nan")], [3.0, 4.0]]), chunks).done
    assert (done["a"].embedding, done["a"].error) == ((), "the model's vector of the text is not finite")
    assert (done["b"].embedding, done["b"].error) == ((3.0, 4.0), None)
