"""Hooks around steps: which are found, when they are called, and with what."""

import torch
from torch import nn

from anabranch.routing.fixed import fix, release
from anabranch.train import StepHooks, follow_steps


class Told(nn.Module):
    """Notes what it is told, in a list of all."""

    def __init__(self, name, calls, *inner):
        super().__init__()
        self.name, self.calls = name, calls
        self.inner = nn.ModuleList(inner)
        self.weight = nn.Parameter(torch.ones(1))

    def before_step(self, step, fraction):
        self.calls.append((f"before {self.name}", step, fraction))

    def on_step(self, step, fraction):
        self.calls.append((f"on {self.name}", step, fraction))


def test_all_modules_are_told_outer_ones_first_and_others_last():
    calls = []
    model = Told("outer", calls, Told("inner", calls), nn.Linear(1, 1))
    hooks = StepHooks(model, 4, others=[Told("task", calls), object()])
    hooks.run_before(0)
    hooks.run_after(1)
    assert calls == [
        ("before outer", 0, 0.0),
        ("before inner", 0, 0.0),
        ("before task", 0, 0.0),
        ("on outer", 1, 0.25),
        ("on inner", 1, 0.25),
        ("on task", 1, 0.25),
    ]


def test_a_base_that_stays_as_it_is_is_not_told():
    calls = []
    base = Told("base", calls)
    fix(base, "test")
    base.inner.append(Told("put on", calls))
    hooks = StepHooks(base, 1)
    hooks.run_after(0)
    hooks.run_before(0)
    assert [name for name, *_ in calls] == ["on put on", "before put on"]
    release(base, "test")
    StepHooks(base, 1).run_after(0)
    assert [name for name, *_ in calls[2:]] == ["on base", "on put on"]


def test_a_training_of_no_steps_has_begun():
    calls = []
    StepHooks(Told("model", calls), 0).run_after(0)
    assert calls == [("on model", 0, 0.0)]


def test_a_loop_of_ones_own_is_followed_until_the_handle_is_removed():
    calls = []
    model = Told("model", calls)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    handle = follow_steps(optimizer, model, 4, start=2)
    assert calls == [("on model", 2, 0.5), ("before model", 2, 0.5)]
    optimizer.step()
    assert calls[2:] == [("on model", 3, 0.75), ("before model", 3, 0.75)]
    handle.remove()
    optimizer.step()
    assert len(calls) == 4
