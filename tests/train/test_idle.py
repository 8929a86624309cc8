"""Experts that stay idle are told once, from the loads that training measures."""

import logging

import numpy as np
import pytest

from anabranch.experts.rexmoe import ReXMoE
from anabranch.lm import Decoder
from anabranch.nn import SelfAttention
from anabranch.routing import LinearScore
from anabranch.train import Trainer
from anabranch.train.idle import ENOUGH, LASTING, IdleWatch
from anabranch.train.meter import Counted, LoadMeter

COLLAPSED = np.array([400, 400, 390, 0, 3, 300, 310, 350])


def told(caplog, steps):
    """What a watch says of the loads of ``steps``, each by name."""
    watch = IdleWatch(0)
    with caplog.at_level(logging.WARNING, "anabranch"):
        for step, loads in enumerate(steps, start=1):
            watch.see(step, loads)
    return caplog.messages


def test_a_quarter_idle_for_a_hundred_steps_is_told_once_for_each_layer(caplog):
    even = np.full(8, 300)
    messages = told(caplog, [{"layer 0": even, "layers 1 to 2": COLLAPSED}] * (LASTING + 5))
    assert messages == [
        "2 of 8 experts of layers 1 to 2 are idle (under a tenth of the mean load, from step 1 to 101); the routing may have collapsed: "
        "balance it more, or share experts among fewer layers"
    ]


@pytest.mark.parametrize(
    ("steps", "every", "at"),
    [(0, 10, 110), (500, 10, 110), (0, 60, 180), (0, 500, 1500), (2000, 10, 410), (2000, 60, 480)],
)
def test_logged_steps_may_be_far_apart_and_long_trainings_take_longer(caplog, steps, every, at):
    watch = IdleWatch(steps)
    with caplog.at_level(logging.WARNING, "anabranch"):
        for step in range(every, 2000, every):
            watch.see(step, {"layer 0": COLLAPSED})
    (message,) = caplog.messages
    assert f"from step {every} to {at})" in message


def test_a_step_in_which_they_work_begins_the_stretch_anew(caplog):
    steps = [{"layer 0": COLLAPSED}] * LASTING + [{"layer 0": np.full(8, 300)}]
    assert told(caplog, steps * 3) == []


@pytest.mark.parametrize(
    "load_E",
    [
        np.array([400, 400, 390, 0, 310, 300, 310, 350]),
        np.array([2 * ENOUGH - 1, 0]),
        np.array([1000]),
        np.array([], int),
        np.zeros(8),
    ],
    ids=["one of eight", "too few items", "one expert", "no expert", "no items"],
)
def test_what_is_no_collapse_is_not_told(caplog, load_E):
    assert told(caplog, [{"layer 0": load_E}] * (2 * LASTING)) == []


@pytest.mark.parametrize(
    "load_E", [np.array([2 * ENOUGH, 0]), np.array([1000, 0])], ids=["just enough items", "two experts"]
)
def test_the_least_that_says_something_is_told(caplog, load_E):
    (message,) = told(caplog, [{"layer 0": load_E}] * (LASTING + 1))
    assert message.startswith("1 of 2 experts of layer 0 are idle")


def test_a_stretch_that_is_a_step_too_short_is_not_told(caplog):
    assert told(caplog, [{"layer 0": COLLAPSED}] * LASTING) == []


def model_of(**fields):
    layer = ReXMoE.Config(**{"num_experts": 4, "hidden_dim": 8, "reuse": 2, "psr": None, **fields})
    attention = SelfAttention.Config(num_heads=2)
    return Decoder.Config(dim=16, num_layers=3, attention=attention, feed_forward=layer)


def test_experts_of_a_pool_are_busy_if_one_of_its_layers_uses_them_while_they_are_open():
    routers = [module for module in Decoder(model_of()).modules() if getattr(module, "is_router", False)]
    loads = [np.array([8, 0, 0, 0, 4, 4, 4, 4]), np.array([0, 8, 8, 0, 0, 0, 0, 8]), np.array([1, 2, 3, 4])]
    half = np.array([True, False, True, False] * 2)
    found = Counted(routers, loads, [half, None, None]).loads_while_open()
    assert found.keys() == {"layers 0 to 1", "layer 2"}
    assert found["layers 0 to 1"].tolist() == [4, 8, 4, 0, 2, 4, 2, 12]
    assert found["layer 2"].tolist() == [1, 2, 3, 4]
    closed = Counted(routers[:1], loads[:1], [half]).loads_while_open()
    assert closed["layer 0"].tolist() == [8, 0, 4, 4]


def test_training_tells_of_routers_that_always_choose_the_same(
    make_run, tmp_path, without_kernels, monkeypatch, caplog
):
    monkeypatch.setattr("anabranch.train.idle.LASTING", 9)
    config = make_run(model_of(), steps=12, batch_size=16)
    with caplog.at_level(logging.WARNING, "anabranch"):
        Trainer(config, tmp_path / "even").fit()
    assert caplog.messages == []
    project = LinearScore.project
    monkeypatch.setattr(LinearScore, "project", lambda self, x_ND, context: 0 * project(self, x_ND, context))
    with caplog.at_level(logging.WARNING, "anabranch"):
        Trainer(config, tmp_path / "collapsed").fit()
    assert [message.partition(";")[0] for message in caplog.messages] == [
        "6 of 8 experts of layers 0 to 1 are idle (under a tenth of the mean load, from step 1 to 10)",
        "2 of 4 experts of layer 2 are idle (under a tenth of the mean load, from step 1 to 10)",
    ]


def test_a_model_without_routers_has_no_idle_experts(dense_model):
    meter = LoadMeter(Decoder(dense_model))
    counted = meter.count(training=True)
    assert counted.loads_while_open() == {}
    assert counted.measures() == {}
