"""Random numbers by key: known answers of Philox, rows alone, and what a thread draws."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from anabranch.cluster import GPipe, KeyedDropout, keyed_uniform, random_key
from anabranch.cluster.keyed_random import drawing, philox
from anabranch.errors import InputError


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # known answers of Random123, philox4x32-10
        ([0] * 4, (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, (0xFFFFFFFF, 0xFFFFFFFF), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_known_answers(counter, key, expected):
    assert philox(torch.tensor([counter]), key).tolist() == [expected]


def test_a_row_is_a_function_of_its_number():
    key = {"seed": 3, "step": 5, "layer": 2}
    whole = keyed_uniform((8, 3, 5), **key)
    assert whole.shape == (8, 3, 5)
    assert whole.min() >= 0
    assert whole.max() < 1
    parts = torch.cat([keyed_uniform((2, 3, 5), rows=torch.arange(start, start + 2), **key) for start in (0, 2, 4, 6)])
    assert torch.equal(parts, whole)
    # Fewer numbers of a row are its first ones.
    assert torch.equal(keyed_uniform((8, 2), **key), whole.reshape(8, -1)[:, :2])


@pytest.mark.parametrize("change", [{"seed": 4}, {"step": 6}, {"layer": 3}, {"micro_batch": 1}])
def test_every_part_of_the_key_counts(change):
    key = {"seed": 3, "step": 5, "layer": 2}
    assert (keyed_uniform((4, 64), **key) == keyed_uniform((4, 64), **{**key, **change})).float().mean() < 0.05


def test_numbers_are_uniform_and_independent():
    drawn = keyed_uniform((64, 1024), seed=0, step=0, layer=0).double()
    assert drawn.mean() == pytest.approx(0.5, abs=0.005)
    assert drawn.var() == pytest.approx(1 / 12, abs=0.002)
    between = torch.corrcoef(drawn)
    assert (between - torch.eye(64)).abs().max() < 0.2


def test_keyed_dropout_keeps_the_mean_and_needs_no_layout():
    layer = KeyedDropout(0.25, seed=1, layer=4)
    layer.step = 9
    x = torch.ones(6, 4096)
    whole = layer(x)
    assert whole.unique().tolist() == [0, pytest.approx(4 / 3)]
    assert whole.mean() == pytest.approx(1, abs=0.02)
    layer.first_row = 4
    assert torch.equal(layer(x[4:]), whole[4:])
    assert layer.eval()(x) is x
    assert KeyedDropout(1.0)(x).sum() == 0


def test_keys_differ_and_are_seeds():
    keys = {random_key(seed, step, layer) for seed in range(3) for step in range(3) for layer in range(3)}
    assert len(keys) == 27
    assert all(0 <= key < 2**63 for key in keys)
    assert random_key(1, 2) != random_key(2, 1)


def test_what_is_drawn_in_a_block_is_a_function_of_its_seed():
    x = torch.ones(256)
    with drawing(7) as mode:
        first = F.dropout(x, 0.5), torch.rand(3), torch.randn(2, 2), torch.empty(4).uniform_()
    assert mode.has_drawn
    torch.rand(11)
    before = torch.get_rng_state()
    with drawing(7):
        again = F.dropout(x, 0.5), torch.rand(3), torch.randn(2, 2), torch.empty(4).uniform_()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_threads_do_not_mix_what_they_draw():
    def many(seed, found):
        with drawing(seed):
            found.append(torch.stack([torch.rand(10) for _ in range(200)]))

    alone = []
    many(0, alone)
    many(1, alone)
    both = [[], []]
    threads = [threading.Thread(target=many, args=(seed, both[seed])) for seed in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(both[0][0], alone[0])
    assert torch.equal(both[1][0], alone[1])


def test_what_draws_nothing_is_known_to():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.LayerNorm(4))
    query = torch.ones(1, 1, 3, 4)
    with drawing(0) as mode:
        model(torch.ones(2, 4))
        F.scaled_dot_product_attention(query, query, query)
    assert not mode.has_drawn


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: keyed_uniform((), seed=0, step=0, layer=0), "shape is empty"),
        (lambda: keyed_uniform((2, 2), seed=0, step=-1, layer=0), "step is -1"),
        (lambda: keyed_uniform((2, 2), seed=0, step=0, layer=0, rows=torch.arange(3)), "rows has shape"),
        (lambda: random_key(2**64), "whole numbers of 64 bits"),
        (lambda: KeyedDropout(1.5), "p is 1.5"),
    ],
)
def test_wrong_keys_are_told(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_a_dropout_without_a_number_is_told():
    with pytest.raises(InputError, match="a KeyedDropout has no number: give layer="):
        KeyedDropout(0.5)(torch.ones(2, 2))
    assert KeyedDropout(0.5).eval()(torch.ones(2, 2)).sum() == 4


class _Masks(nn.Module):
    """A layer with two dropouts of defaults, that keeps which numbers they dropped."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.dropped = KeyedDropout(0.5), KeyedDropout(0.5), []
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        for drop in (self.first, self.second):
            kept = drop(torch.ones_like(x))
            self.dropped.append(kept == 0)
            x = x + kept
        return x * self.scale


def _masks(stages=1, seed=0, steps=1, micro_batches=1):
    model = nn.Sequential(*(_Masks() for _ in range(4)))
    pipe = GPipe(model, stages=stages, micro_batches=micro_batches, seed=seed, checkpoint="never")
    for _ in range(steps):
        pipe.step(torch.zeros(8, 32), torch.zeros(8, 32), nn.functional.mse_loss)
    return [torch.cat(layer.dropped[place::2]) for layer in model for place in (0, 1)]


def test_a_pipeline_tells_dropouts_of_defaults_apart():
    masks = _masks()
    assert [(a, b) for a in range(8) for b in range(a) if torch.equal(masks[a], masks[b])] == []
    # Whatever stages and micro-batches there are, a row drops the same.
    for options in ({"stages": 4}, {"micro_batches": 3}, {"stages": 2, "micro_batches": 8}):
        assert all(map(torch.equal, masks, _masks(**options)))


def test_the_seed_of_a_pipeline_and_its_step_reach_dropouts():
    first, other, both = _masks(), _masks(seed=1), _masks(steps=2)
    for mask, another, two in zip(first, other, both, strict=True):
        assert not torch.equal(mask, another)
        assert torch.equal(two[:8], mask)
        assert not torch.equal(two[8:], mask)


def test_a_dropout_that_stands_in_two_layers_drops_apart_in_each():
    drop = KeyedDropout(0.5)
    seen = []
    drop.register_forward_hook(lambda module, given, made: seen.append(made == 0))
    model = nn.Sequential(nn.Linear(8, 64), drop, nn.Linear(64, 64), drop, nn.Linear(64, 8))
    GPipe(model, stages=1, checkpoint="never").step(torch.randn(4, 8), torch.randn(4, 8), nn.functional.mse_loss)
    assert not torch.equal(*seen)


def test_of_rows_the_low_32_bits_count():
    """As the docstring says: they are not checked."""
    told = {"seed": 0, "step": 0, "layer": 0}
    rows = torch.tensor([5, 2**32 + 5, 5 - 2**32, -1, 2**32 - 1, 6])
    drawn = keyed_uniform((6, 4), rows=rows, **told)
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])
    assert torch.equal(drawn[3], drawn[4])
    assert not torch.equal(drawn[0], drawn[5])
    for wrong in ({"step": 2**32}, {"step": -1}, {"micro_batch": 2**32}, {"seed": 2**63}, {"layer": 2**63}):
        with pytest.raises(InputError, match=r"use 0 to 4294967295|not of whole numbers of 64 bits"):
            keyed_uniform((1,), **{**told, **wrong})
