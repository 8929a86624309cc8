"""A tiny model with an adapter of each kind, for tests of them all; the fixture ``places`` of tests/adapters makes the folders."""

import torch

from adapter_models import KINDS, make_base, make_kind
from anabranch.adapters import load_peft
from anabranch.adapters.tasks import task_rows
from anabranch.lm import load_model

FAMILIES = ("llama", "qwen2", "olmoe")
MERGED = ("dora", "ia3")
IN_FRONT = ("prompt", "prefix")
# Of all rows, for Poly.
TASK = 1


def make_places(root_of):
    """By family: a folder with the base and an adapter of each kind, the tensors of the base, and those of the adapters."""
    found = {}
    for family in FAMILIES:
        root = root_of(family)
        base = make_base(root / "base", family)
        made = {kind: make_kind(root / kind, kind, base, family, from_the_future=[{"a": None}]) for kind in KINDS}
        found[family] = root, base, made
    return found


def opened(places, family="llama", **options):
    """The base."""
    return load_model(places[family][0] / "base", **options)[0].eval()


def put_on(places, kind, family="llama", model=None, **options):
    """A model with the adapter."""
    task = {"task": TASK} if kind == "poly" else {}
    return load_peft(places[family][0] / kind, model or opened(places, family), **task, **options)


def close(found, wanted, limit=1e-5):
    """Raise unless they are nearly the same, relative to the greatest."""
    torch.testing.assert_close(found, wanted, rtol=limit, atol=limit * float(wanted.detach().abs().max()))


def tasks_for(model, tasks, length):
    """The state of a pass whose rows have tasks of these numbers."""
    return task_rows(model, list(map(str, tasks)), length)
