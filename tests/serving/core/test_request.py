"""What may be said of a request, and in which numbers."""

import dataclasses
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anabranch.errors import InputError
from anabranch.serving.core.request import Request, Sampling
from wrong_requests import WRONG

WHOLE = ("max_tokens", "min_tokens", "top_k", "seed", "logprobs", "prompt_logprobs")
REAL = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
INTS = [int, np.int8, np.uint8, np.int64, np.uint64, np.int32, lambda value: np.array(value), torch.tensor]
FLOATS = [float, np.float16, np.float32, np.float64, Fraction, lambda value: torch.tensor(value, dtype=torch.bfloat16)]


@given(
    st.dictionaries(st.sampled_from(WHOLE), st.tuples(st.sampled_from(INTS), st.integers(0, 20))),
    st.dictionaries(st.sampled_from(REAL), st.tuples(st.sampled_from(FLOATS), st.sampled_from([0.25, 0.5, 1.0]))),
    st.sampled_from(INTS),
    st.sampled_from(FLOATS),
)
def test_numbers_of_every_make_are_those_of_python(whole, real, make_int, make_float):
    made = {name: make(value) for name, (make, value) in (whole | real).items()}
    sampling = Sampling(
        **made, stop_tokens=[make_int(7)], logit_bias=[(make_int(3), make_float(0.5))], ignore_eos=np.bool_(True)
    )
    assert sampling == Sampling(
        **{name: value for name, (_, value) in (whole | real).items()},
        stop_tokens=(7,),
        logit_bias=((3, 0.5),),
        ignore_eos=True,
    )
    for name in WHOLE:
        assert type(getattr(sampling, name)) in (int, type(None))
    assert {type(getattr(sampling, name)) for name in REAL} == {float}
    assert type(sampling.stop_tokens[0]) is type(sampling.logit_bias[0][0]) is int
    assert type(sampling.logit_bias[0][1]) is float


@pytest.mark.parametrize("prompt", [[1, 2], np.array([1, 2]), torch.tensor([1, 2]), (np.int64(1), torch.tensor(2))])
def test_tokens_in_every_form_are_a_tuple(prompt):
    request = Request(id="a", prompt=prompt, path=prompt)
    request.check_fields()
    assert request.prompt == request.path == (1, 2)
    assert {type(token) for token in request.prompt + request.path} == {int}


def test_a_bias_is_such_that_a_logit_with_it_is_a_float32():
    bias = ((1, 10**400), (2, -1e300), (3, -math.inf))
    assert Sampling(logit_bias=bias).logit_bias == ((1, 1e30), (2, -1e30), (3, -math.inf))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("stop_tokens", [5, None, ("a",), ((1,),), (1.5,), "ab", {1}, (None,), np.array([[1]])]),
        (
            "logit_bias",
            [
                5,
                None,
                (1,),
                ((1, 2, 3),),
                (("a", 1),),
                ((1, "a"),),
                ((1, None),),
                ((1.5, 1),),
                {1: 2},
                ((1, math.nan),),
            ],
        ),
        ("seed", ["a", 1.5, (1,), np.array([1])]),
        ("ignore_eos", ["yes", None, 1.5, np.array([1, 0])]),
        ("temperature", [math.nan, math.inf, 1j, "1", None, -1, 10**400, torch.tensor([1.0])]),
        ("max_tokens", [None, 1.0, "1", 10**400, -1]),
        ("grammar", ["", 5, []]),
    ],
)
def test_what_is_no_number_of_its_kind_is_refused_by_name(name, values):
    for value in values:
        with pytest.raises(InputError, match=name):
            Sampling(**{name: value})


@pytest.mark.parametrize("name", WRONG)
def test_a_field_of_the_wrong_kind_is_refused_by_name(name):
    for value in WRONG[name]:
        with pytest.raises(InputError, match=name):
            dataclasses.replace(Request(id="a", prompt=(1,)), **{name: value}).check_fields()


def test_options_may_be_pairs_of_any_make():
    dataclasses.replace(Request(id="a", prompt=(1,)), options=(("a", "b"), ["a", "c"])).check_fields()
