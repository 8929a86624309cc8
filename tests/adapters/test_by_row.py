"""What rows are told, for whoever makes passes of its own rows."""

import pytest
import torch

from anabranch.adapters.by_row import check_told, telling, told_keys, told_rows
from anabranch.errors import ConfigError
from served_adapters import make_model


def state(value_B, length):
    return {"said": value_B.unsqueeze(1).expand(len(value_B), length, *value_B.shape[1:])}


def test_rows_by_their_numbers():
    model = make_model()
    assert told_rows(model, [0, 1], 3) == {}
    with telling(model, "x", torch.tensor([5, 7, 9]), state, what="numbers"):
        assert told_rows(model, [2, 0, 2], 2)["said"].tolist() == [[9, 9], [5, 5], [9, 9]]
        # The inner block holds, and one value is for all.
        with telling(model, "y", torch.tensor([1]), state, what="numbers", for_all=True):
            assert told_rows(model, [2, 0], 1)["said"].tolist() == [[1], [1]]
        assert told_rows(make_model(), [0], 1) == {}
    assert told_rows(model, [0], 1) == {}


def test_rows_that_are_told_the_same_have_equal_keys():
    model = make_model()
    assert told_keys(model, 2) == [(), ()]
    with (
        telling(model, "x", torch.tensor([5, 5, 9]), state, what="numbers"),
        telling(model, "y", torch.tensor([[0.5, 1.0], [0.5, 1.0], [0.5, 1.0]]), state, what="vectors"),
        telling(model, "z", torch.tensor([1]), state, what="numbers", for_all=True),
    ):
        first, second, third = told_keys(model, 3)
        assert first == second != third
        hash(first)


def test_as_many_as_there_are_texts():
    model = make_model()
    check_told(model, 5, "somebody")
    with telling(model, "x", torch.tensor([5, 7]), state, what="numbers"):
        check_told(model, 2, "somebody")
        with pytest.raises(
            ConfigError,
            match="2 numbers are told to the rows of the model, and somebody has 3 texts; tell one for each",
        ):
            check_told(model, 3, "somebody")
    with telling(model, "x", torch.tensor([5]), state, what="numbers"):
        check_told(model, 3, "somebody")
