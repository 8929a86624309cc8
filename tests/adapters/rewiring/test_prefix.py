"""What stands before the first router is computed once, and all passes go on from it as from their own."""

import pytest
import torch

from anabranch.adapters.rewiring import Rerouter, Rewiring
from anabranch.adapters.rewiring.prefix import Prefix
from anabranch.adapters.rewiring.vectors import Vectors, run
from anabranch.lm import Decoder
from anabranch.lm.generate import pad_left
from anabranch.nn import MoE, Sandwich, SwiGLU
from anabranch.routing import LinearScore, Router, TopK

ROUTER = Router.Config(score=LinearScore.Config(init_std=0.5), select=TopK.Config(top_k=2), balance=())
BODY = {"vocab_size": 61, "dim": 16, "num_layers": 3, "init_std": 0.4, "depth_scaled_init": False}
EXPERTS = MoE.Config(num_experts=4, hidden_dim=16, router=ROUTER)
MODELS = {
    "all blocks route": {},
    "dense blocks in front": {"dense_layers": (0, 1), "dense_feed_forward": SwiGLU.Config(hidden_dim=16)},
}
TEXTS = [list(range(3, 40)), [5, 9, 60, 1, 22, 8, 8, 13, 4, 2, 2, 50], [7] * 30]


def model_of(**changes):
    return Decoder.Config(**{**BODY, **changes}, feed_forward=EXPERTS).build(seed=0).eval().requires_grad_(False)


def vectors_of(rerouter, rows, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    delta = [torch.randn(rows, len(delta_E), generator=generator) for delta_E in rerouter.new_state().delta]
    return Vectors(rerouter.layers, delta, length)


def kept(model, rerouter, token_BL, mask_BL):
    prefix = Prefix(model, rerouter.layers)
    assert prefix.is_there
    prefix.keep(model, token_BL, model.context(token_BL, token_mask_BL=mask_BL))
    return prefix


@pytest.mark.parametrize("name", MODELS)
def test_passes_that_go_on_from_it_are_those_that_begin_anew(name):
    """Whole, of the first positions alone, and of several copies of the rows."""
    model = model_of(**MODELS[name])
    rerouter = Rerouter(model)
    token_BL, mask_BL = pad_left(TEXTS, torch.device("cpu"))
    prefix = kept(model, rerouter, token_BL, mask_BL)
    rows, length = token_BL.shape
    for copies, first in ((1, length), (1, 20), (3, length)):
        tokens, mask = token_BL[:, :first].repeat(copies, 1), mask_BL[:, :first].repeat(copies, 1)
        vectors = vectors_of(rerouter, copies * rows, first)
        wanted = run(model, tokens, mask, vectors)
        found = run(model, tokens, mask, vectors, prefix=prefix)
        real = mask.unsqueeze(-1)
        torch.testing.assert_close(found * real, wanted * real, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_a_phase_runs_it_once(name, monkeypatch):
    model, calls = model_of(**MODELS[name]), []
    first, last = model.blocks[0].attention, model.blocks[-1].attention
    original = type(first).forward
    monkeypatch.setattr(type(first), "forward", lambda self, *a: calls.append(self) or original(self, *a))
    rerouter = Rerouter(model, Rewiring(steps=4, guard=True, select="all"))
    rerouter.adapt(TEXTS, [rerouter.new_state() for _ in TEXTS])
    assert sum(one is first for one in calls) == 1
    # 4 steps, and the candidates together; where the last block alone routes, its attention stands before the first router.
    assert sum(one is last for one in calls) == (1 if MODELS[name] else 5)


@pytest.mark.parametrize("guard", [True, False])
def test_what_is_fitted_is_what_would_be_without(guard, monkeypatch):
    found, original = [], Prefix.__init__
    for is_there in (True, False):
        if not is_there:
            monkeypatch.setattr(
                Prefix, "__init__", lambda self, *a: original(self, *a) or setattr(self, "is_there", False)
            )
        model = model_of()
        rerouter = Rerouter(model, Rewiring(guard=guard, select="all"))
        states = [rerouter.new_state() for _ in TEXTS]
        rerouter.adapt(TEXTS, states)
        found.append([delta_E for state in states for delta_E in state.delta])
    for ours, wanted in zip(*found, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-4)


def test_where_nothing_is_kept():
    def is_there(model):
        return Prefix(model, Rerouter(model).layers).is_there

    assert is_there(model_of())
    assert not is_there(model_of(block=Sandwich.Config()))
    watched = model_of()
    watched.blocks[0].attention.register_forward_hook(lambda *_: None)
    assert not is_there(watched)
    replaced = model_of()
    replaced.blocks[0].forward = replaced.blocks[0].forward
    assert not is_there(replaced)
