"""Casts that do nothing give back the very tensor; autocast is off inside `full_precision`, whatever it was."""

import pytest
import torch

from anabranch.precision import autocast_dtype, cast, full_precision, wide


def test_half_precision_is_widened_and_all_else_is_left():
    for dtype in (torch.float32, torch.float64):
        x = torch.zeros(2, dtype=dtype)
        assert wide(x) is x
    assert wide(torch.zeros(2, dtype=torch.bfloat16)).dtype == torch.float32


def test_a_cast_to_the_same_type_is_the_tensor_itself():
    x = torch.zeros(2)
    assert cast(x, torch.float32) is x
    assert cast(x, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("enabled", [True, False])
def test_full_precision_switches_autocast_off_and_leaves_it_as_it_was(enabled):
    x = torch.ones(2, 2)
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        before = autocast_dtype("cpu")
        assert before == (torch.bfloat16 if enabled else None)
        with full_precision("cpu"):
            assert autocast_dtype("cpu") is None
            assert (x @ x).dtype == torch.float32
        assert autocast_dtype("cpu") == before
    assert autocast_dtype("meta") is None
