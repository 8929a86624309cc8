"""Requests that run blocks in an order of their own: each gets what the decoder gives without a cache, whoever is beside it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.data import ByteTokenizer
from anabranch.errors import CapacityError, InputError
from anabranch.experts.parscale import ParScale
from anabranch.lm import save_model
from anabranch.nn import PreNorm, SwiGLU
from anabranch.routing import record_routing
from anabranch.serving import LLM, Output, Request, Sampling
from anabranch.serving.core.hooks import RequestOverride
from anabranch.serving.engine.messages import Add
from anabranch.serving.engine.paged import VisitSlots
from anabranch.serving.engine.runner import ModelRunner

PLENTY = {"num_blocks": 200, "block_tokens": 4, "max_depth": 5}
SCARCE = {
    "num_blocks": 9,
    "block_tokens": 4,
    "max_batched_tokens": 9,
    "max_seqs": 4,
    "long_prefill_chunk": 5,
    "max_depth": 5,
}
SAMPLING = Sampling(temperature=0.0, max_tokens=6, ignore_eos=True)
PROMPTS = {"one": (1, 2, 3, 4, 5, 6), "two": (7,), "three": (8, 9, 10, 11, 12, 13, 14, 15, 16)}
PATHS = {
    "usual": None,
    "twice": (0, 1, 1, 2),
    "skipped": (0, 2),
    "back": (2, 0, 1),
    "deep": (0, 1, 1, 1, 2),
    "none": (),
}
ALL = {f"{name} {which}": (PATHS[name], prompt) for which, prompt in PROMPTS.items() for name in PATHS}


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model(num_layers=3)


@torch.no_grad()
def uncached(model, prompt, path, **options):
    """Greedy tokens, each from a pass over the whole sequence."""
    tokens = list(prompt)
    for _ in range(SAMPLING.max_tokens):
        logits_BLV = model(torch.tensor([tokens]), path=path, last_only=True, **options).logits_BLV
        tokens.append(int(logits_BLV[0, -1].argmax()))
    return tuple(tokens[len(prompt) :])


def serve(model, requests, *, options=(), record=False, **config):
    """{id: (tokens, error, routing)} of requests that come all at once: {id: (path, prompt)}."""
    llm = LLM(model, **config)
    for id, (path, prompt) in requests.items():
        asked = Request(id=id, prompt=prompt, sampling=SAMPLING, path=path, options=options, record_routing=record)
        llm._loop.put(Add(asked))
    llm._loop.run(until_idle=True)
    found = dict.fromkeys(requests, ((), None, ()))
    for event in (event for event in llm._events if isinstance(event, Output)):
        tokens, error, routing = found[event.id]
        found[event.id] = (tokens + event.tokens, event.error or error, routing + event.routing)
    llm.close()
    return found


@pytest.mark.parametrize("scheduling", ["sync", "async"])
@pytest.mark.parametrize("limits", [PLENTY, SCARCE], ids=["plenty", "scarce"])
@pytest.mark.parametrize("kernel", [True, False])
def test_paths_beside_each_other_give_what_passes_without_a_cache_give(model, limits, scheduling, kernel):
    def make_runner(*given, **more):
        return ModelRunner(*given, use_kernel=kernel, **more)

    found = serve(model, ALL, scheduling=scheduling, make_runner=make_runner, **limits)
    for id, (path, prompt) in ALL.items():
        assert found[id][0] == uncached(model, prompt, path), id
    assert len({found[f"{name} three"][0] for name in PATHS}) > 4  # paths make a difference


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.lists(st.integers(0, 2), max_size=5), st.sampled_from(sorted(PROMPTS))), max_size=4))
def test_any_paths(model, asked):
    requests = {str(number): (tuple(path), PROMPTS[which]) for number, (path, which) in enumerate(asked)}
    found = serve(model, requests, **PLENTY)
    assert {id: one[0] for id, one in found.items()} == {
        id: uncached(model, prompt, path) for id, (path, prompt) in requests.items()
    }


def test_a_neighbour_of_another_path_changes_no_bit(model):
    own = {id: asked for id, asked in ALL.items() if id.startswith("twice")}
    others = {id: asked for id, asked in ALL.items() if id not in own}
    alone = serve(model, own, record=True, deterministic=True, **SCARCE)
    beside = serve(model, {**others, **own}, record=True, deterministic=True, **SCARCE)
    assert {id: beside[id] for id in own} == alone


def test_streams_take_paths_too(tiny_model):
    streams = ParScale.Config(num_streams=3, switchable=(2,), prefix_len=3, prefix="direct", prefix_std=1.0)
    model = tiny_model(num_layers=3).config.replace(streams=streams).build(seed=0).eval()
    llm = LLM(model, **PLENTY)
    for path in ((0, 1, 1, 2), (2, 0)):
        for number in (1, 2, 3):
            [answer] = llm.generate([PROMPTS["three"]], SAMPLING, path=path, num_streams=number)
            assert answer.tokens == uncached(model, PROMPTS["three"], path, num_streams=number)
    llm.close()


def test_keys_and_values_are_shared_along_one_path_alone(model):
    llm, found = LLM(model, **PLENTY), []
    for path in (None, (0, 1, 1), (0, 1), (0, 1, 1), None):
        [answer] = llm.generate([PROMPTS["three"]], SAMPLING, path=path)
        found.append(answer.output.cached_tokens)
        assert answer.tokens == uncached(model, PROMPTS["three"], path)
    assert found == [0, 0, 0, 8, 8]
    llm.close()


@pytest.mark.parametrize(("name", "value"), [("path", "0,1,1"), ("num_streams", "2")])
def test_an_option_of_that_name_is_no_path_and_no_number_of_streams(tiny_model, name, value):
    streams = ParScale.Config(num_streams=3, switchable=(2,), prefix_len=3, prefix="direct", prefix_std=1.0)
    model = tiny_model(num_layers=3).config.replace(streams=streams).build(seed=0).eval()
    own = {"path": (0, 1, 1)} if name == "path" else {"num_streams": 2}
    llm = LLM(model, **PLENTY)
    for options in ({"options": ((name, value),)}, own):
        [answer] = llm.generate([PROMPTS["three"]], SAMPLING, **options)
        assert answer.output.cached_tokens == 0
    assert answer.tokens == uncached(model, PROMPTS["three"], own.get("path"), num_streams=own.get("num_streams"))
    llm.close()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ((0, 3), "path has block 3; the model has blocks 0 to 2"),
        ((0, -1), "path has block -1"),
        ((0, "1"), "path has block '1'"),
        ((0, True), "path has block True"),
        ((0, 1.0), "path has block 1.0"),
        (5, "path is 5; give block numbers"),
        ("01", "path is '01'; give block numbers"),
        (((0, 1),), "a request has one path, of block numbers"),
        (
            (0, 0, 0, 0, 0, 0),
            r"path has 6 visits of blocks; the engine keeps keys and values of 5 \(engine.max_depth\)",
        ),
    ],
)
def test_a_path_that_cannot_be_is_refused(model, path, message):
    llm = LLM(model, **PLENTY)
    with pytest.raises(InputError, match=message):
        llm.generate([PROMPTS["one"]], SAMPLING, path=path)
    assert llm.generate([PROMPTS["one"]], SAMPLING)[0].tokens == uncached(model, PROMPTS["one"], None)
    llm.close()


def test_room_is_taken_for_the_deepest_path(model):
    sizes = [LLM(model, num_blocks=3, max_depth=depth).engine.runner.pool.size_bytes for depth in (None, 2, 3, 6)]
    assert sizes == [sizes[0], sizes[0], sizes[0], 2 * sizes[0]]
    # Blocks that are left out make room for others that run again.
    llm = LLM(model, num_blocks=50)
    [answer] = llm.generate([PROMPTS["one"]], SAMPLING, path=(1, 1, 1))
    assert answer.tokens == uncached(model, PROMPTS["one"], (1, 1, 1))
    llm.close()


def test_a_first_visit_is_kept_where_its_layer_is_and_others_where_there_is_room():
    slots = VisitSlots(5, range(4), (2, 0, 2))
    # Behind all layers, then where those are that the path leaves out; one that comes all the same is where it belongs, if that is free.
    assert [slots.of(2, 0), slots.of(0, 0), slots.of(2, 1), slots.of(2, 2), slots.of(3, 0), slots.of(2, 1)] == [
        2,
        0,
        4,
        1,
        3,
        4,
    ]
    with pytest.raises(
        CapacityError, match="keeps keys and values of 5 visits of blocks, and layer 1 is visited once more"
    ):
        slots.of(1, 0)
    assert VisitSlots(4, (5, 7)).per_pass == {5: 1, 7: 1}
    kind = VisitSlots(3, (5, 7), (7, 7, 7))
    assert [kind.of(7, visit) for visit in range(3)] == [1, 2, 0]


class Twice(PreNorm, kind="twice"):
    """A block whose attention and feed-forward run twice in every pass."""

    class Config(PreNorm.Config):
        pass

    def forward(self, x_BLD, context):
        return super().forward(super().forward(x_BLD, context), context)


@pytest.mark.parametrize("kernel", [True, False])
def test_a_block_that_runs_twice_by_itself(tiny_model, kernel):
    def make_runner(*given, **more):
        return ModelRunner(*given, use_kernel=kernel, **more)

    model = tiny_model(num_layers=2, block=Twice.Config(), feed_forward=SwiGLU.Config(hidden_dim=8), init_std=0.2)
    requests = {which: (None, prompt) for which, prompt in PROMPTS.items()}
    found = serve(model, requests, make_runner=make_runner, **{**SCARCE, "max_depth": 4})
    for which, prompt in PROMPTS.items():
        assert found[which][0] == uncached(model, prompt, None)
    llm = LLM(model, num_blocks=50)
    with pytest.raises(CapacityError, match=r"keeps keys and values of 2 visits .* set engine.max_depth"):
        llm.engine.runner.warm_up()
    # What the warm-up has shown counts before a request runs.
    llm = LLM(model, num_blocks=50, max_depth=4)
    llm.engine.runner.warm_up()
    assert llm.generate([PROMPTS["one"]], SAMPLING, path=(1, 1))[0].tokens == uncached(model, PROMPTS["one"], (1, 1))
    with pytest.raises(InputError, match="path has 6 visits of blocks; the engine keeps keys and values of 4"):
        llm.generate([PROMPTS["one"]], SAMPLING, path=(0, 1, 1))
    llm.close()


class Deep:
    """Says of each request the path of its name."""

    def before_step(self, batch, tokens):
        pass

    def override(self, batch, tokens):
        return {chunk.id: RequestOverride(path=PATHS.get(chunk.id.split()[0], (9,))) for chunk in batch.chunks}

    def after_step(self, batch, sampled):
        pass

    def close(self):
        pass


@pytest.mark.parametrize("limits", [PLENTY, SCARCE], ids=["plenty", "scarce"])
def test_a_hook_says_the_depth_of_each_request(tiny_model, limits):
    model = tiny_model(num_layers=3, feed_forward=SwiGLU.Config(hidden_dim=8))
    asked = {id: (None, prompt) for id, (_, prompt) in ALL.items()} | {"wrong one": (None, PROMPTS["one"])}
    found = serve(model, asked, hooks=[Deep()], options=(("routing", "depth"),), prefix_cache=False, **limits)
    for id, (path, prompt) in ALL.items():
        assert found[id][0] == uncached(model, prompt, path), id
    assert found["wrong one"][1] == "path has block 9; the model has blocks 0 to 2"


def test_experts_of_a_block_that_runs_several_times_are_told_together(model):
    path, prompt = (0, 1, 1, 1, 2), PROMPTS["one"]
    [(tokens, _, routes)] = serve(model, {"deep one": (path, prompt)}, record=True, **PLENTY).values()
    seen = []
    handle = model.blocks[1].feed_forward.router.register_forward_hook(
        lambda router, given, routing: seen.append(set(routing.index_NK[-1].tolist()))
    )
    for count, route in enumerate(routes):
        seen.clear()
        with torch.no_grad():
            model(torch.tensor([[*prompt, *tokens[:count]]]), path=path)
        assert sorted(route) == [0, 1, 2]
        assert set(route[1]) == set.union(*seen)
        assert len(route[1]) == len(set(route[1]))
        assert len(seen) == 3
    handle.remove()


def test_a_trace_of_a_path_is_that_of_a_pass_over_the_whole_sequence(model):
    path, prompt = (0, 1, 1, 2), PROMPTS["one"]

    def decisions(recorder):
        columns = ("layer", "position", "rank", "token", "destination")
        return sorted(tuple(row[name] for name in columns) for row in recorder.trace().table.to_pylist())

    with record_routing(model) as ours:
        [(tokens, _, _)] = serve(model, {"deep one": (path, prompt)}, **PLENTY).values()
    with record_routing(model) as theirs, torch.no_grad():
        model(torch.tensor([[*prompt, *tokens[:-1]]]), path=path)
    assert decisions(ours) == decisions(theirs)
    assert len(decisions(ours)) == 4 * 2 * (len(prompt) + len(tokens) - 1)


def test_experts_that_are_loaded_on_demand_are_there_on_any_path(model, tmp_path):
    save_model(tmp_path / "model", model, ByteTokenizer())
    llm = LLM(tmp_path / "model", expert_budget="3KiB", dtype="float32", num_blocks=50, max_depth=5)
    for path in ((2, 0, 0, 1), None, (1, 1, 1, 2)):
        [answer] = llm.generate([PROMPTS["three"]], SAMPLING, path=path)
        assert answer.tokens == uncached(model, PROMPTS["three"], path)
    llm.close()
