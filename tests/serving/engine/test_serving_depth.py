"""Full depth, paths and depth that routers choose in one continuous batch: each request gets what it gets alone, without a cache."""

import copy

import pytest
import torch

from adapter_models import make_adapter
from anabranch.adapters import load_peft
from anabranch.data import ByteTokenizer
from anabranch.depth import DepthRouter, path_of, routed_pass, stack_of
from anabranch.depth.dr_llm.bank import BankConfig, RouterBank
from anabranch.depth.ftp import TokenSkipper
from anabranch.errors import CapacityError, ConfigError, InputError
from anabranch.lm import Decoder, save_model
from anabranch.nn import MoE, SelfAttention, SwiGLU, kernels
from anabranch.routing import record_routing
from anabranch.serving import LLM, Output, Request, Sampling
from anabranch.serving.adapters import AdaptersConfig
from anabranch.serving.config import ServingConfig
from anabranch.serving.core.batch import Batch
from anabranch.serving.depth import DepthConfig
from anabranch.serving.elasticmoe.handover import freeze, thaw
from anabranch.serving.engine.engine import Engine
from anabranch.serving.engine.messages import Add
from anabranch.serving.engine.paged import VisitSlots
from anabranch.serving.engine.runner import ModelRunner
from anabranch.serving.fast.paths import CompiledStep
from depth_banks import ByControl, ByState, Scripted, saved_bank
from served_adapters import Runs, layers_of, make_model

LAYERS = 3
PLENTY = {"num_blocks": 200, "block_tokens": 4}
SCARCE = {"num_blocks": 12, "block_tokens": 4, "max_batched_tokens": 9, "max_seqs": 4, "long_prefill_chunk": 5}
SAMPLING = Sampling(temperature=0.0, max_tokens=6, ignore_eos=True)
PROMPTS = [(1, 2, 3, 4, 5, 6), (7,), (8, 9, 10, 11, 12, 13, 14, 15, 16), (30, 2), (5, 5, 5, 5, 9)]
PATHS = {"full": None, "twice": (0, 1, 1, 2), "skipped": (0, 2), "back": (2, 0, 1), "none": (), "routed": "routed"}


def built(feed_forward, **fields):
    config = Decoder.Config(
        vocab_size=31,
        dim=32,
        num_layers=LAYERS,
        attention=SelfAttention.Config(num_heads=2, num_kv_heads=1),
        init_std=0.3,
        max_positions=128,
        feed_forward=feed_forward,
        **fields,
    )
    return config.build(seed=0).eval()


MODELS = {
    # Which the compiled step runs; and experts, and what it does not know.
    "dense": built(SwiGLU.Config(hidden_dim=64)),
    "experts": built(MoE.Config(num_experts=4, hidden_dim=32)),
    "window": built(
        SwiGLU.Config(hidden_dim=64),
        local_layers=(1,),
        local_attention=SelfAttention.Config(num_heads=2, num_kv_heads=1, window=3),
    ),
}

# Each model, way and size once; all of them by make test-all.
USUAL = {
    ("dense", True, "scarce"),
    ("dense", False, "plenty"),
    ("experts", True, "plenty"),
    ("window", False, "scarce"),
}


@torch.no_grad()
def chosen(model, prompt, bank=None):
    made = routed_pass(stack_of(model), bank or ByState(), torch.tensor([prompt]))
    return path_of(made.decision_BN[0].tolist())


@torch.no_grad()
def uncached(model, prompt, path):
    """Greedy tokens, each from a pass over the whole sequence."""
    tokens = list(prompt)
    for _ in range(SAMPLING.max_tokens):
        tokens.append(int(model(torch.tensor([tokens]), path=path, last_only=True).logits_BLV[0, -1].argmax()))
    return tuple(tokens[len(prompt) :])


def serve(model, bank=None, **config):
    """{(depth, prompt): (tokens, path)} of requests of every depth that come all at once."""
    llm = LLM(model, depth_bank=bank or ByState(), **config)
    asked = {
        f"{name} {number}": (path, prompt) for number, prompt in enumerate(PROMPTS) for name, path in PATHS.items()
    }
    for id, (path, prompt) in asked.items():
        depth = {"routes_depth": True} if path == "routed" else {"path": path}
        llm._loop.put(Add(Request(id=id, prompt=prompt, sampling=SAMPLING, **depth)))
    llm._loop.run(until_idle=True)
    found = dict.fromkeys(asked, ((), None))
    for event in (event for event in llm._events if isinstance(event, Output)):
        assert event.error is None
        tokens, path = found[event.id]
        assert path is None or event.path is None, "a path is told once"
        found[event.id] = (tokens + event.tokens, event.path or path)
    llm.close()
    return {id: (*found[id], *asked[id]) for id in asked}


@pytest.mark.parametrize(
    ("name", "kernel", "limits"),
    [
        pytest.param(
            name,
            kernel,
            limits,
            id=f"{name} {'compiled' if kernel else 'modules'} {size}",
            marks=[] if (name, kernel, size) in USUAL else [pytest.mark.slow],
        )
        for name in MODELS
        for kernel in (True, False)
        for size, limits in (("plenty", PLENTY), ("scarce", SCARCE))
    ],
)
def test_every_depth_beside_every_other_is_each_request_alone(name, kernel, limits):
    def make_runner(*given, **more):
        return ModelRunner(*given, use_kernel=kernel, **more)

    model = MODELS[name]
    paths = {prompt: chosen(model, prompt) for prompt in PROMPTS}
    assert len(set(paths.values())) > 2
    assert any(len(path) > len(set(path)) for path in paths.values())
    found = serve(model, make_runner=make_runner, **limits)
    for id, (tokens, told, path, prompt) in found.items():
        is_routed = path == "routed"
        assert told == (paths[prompt] if is_routed and paths[prompt] else None), id
        assert tokens == uncached(model, prompt, paths[prompt] if is_routed else path), id


@pytest.mark.skipif(kernels.load() is None, reason="no compiler")
def test_steps_of_any_depth_are_compiled(monkeypatch):
    """None of them goes through the modules."""
    llm = LLM(MODELS["dense"], depth_bank=ByState(), **PLENTY)
    assert llm.engine.runner._any_path.takes(is_compiled=True)
    monkeypatch.setattr(Decoder, "hidden", lambda *_, **__: pytest.fail("modules"))
    for block in MODELS["dense"].blocks:
        monkeypatch.setattr(block, "forward", lambda *_, **__: pytest.fail("modules"))
    for depth in ({"routes_depth": True}, {"path": (0, 2, 2)}, {}):
        llm.generate(PROMPTS[:2], SAMPLING, **depth)
    llm.close()


def test_nothing_is_shared_with_a_request_whose_path_is_not_known():
    model, prompt = MODELS["dense"], PROMPTS[2]
    llm = LLM(model, depth_bank=ByState(), **PLENTY)
    cached = []
    for depth in ({"routes_depth": True}, {}, {"routes_depth": True}, {}, {"path": chosen(model, prompt)}):
        [answer] = llm.generate([prompt], SAMPLING, **depth)
        cached.append(answer.output.cached_tokens)
    assert cached == [0, 0, 0, 8, 0]
    reset = llm.engine.controls["reset_prefix_cache"]
    reset()
    llm.generate([prompt], SAMPLING, routes_depth=True)
    assert reset() == 0, "nobody could find what is kept"
    llm.close()


def test_loaded_routers_of_another_model_are_refused():
    model = MODELS["dense"]
    stack = stack_of(model)
    for fields, message in (
        ({"num_blocks": 4}, "num_blocks=4, and the model 3"),
        ({"width": 16}, "width=16, and the model 32"),
        ({"features": "first"}, "states before the first block alone .features=first."),
        ({"fingerprint": "f" * 64}, "of another model of the same sizes: fingerprint f"),
    ):
        bank = RouterBank(BankConfig(**{"num_blocks": stack.num_blocks, "width": stack.width, **fields}))
        with pytest.raises(ConfigError, match=message):
            Engine.of(model, ServingConfig(num_blocks=16), tokenizer=ByteTokenizer(), depth_bank=bank)
    with pytest.raises(ConfigError, match="bank is a int"):
        Engine.of(model, ServingConfig(num_blocks=16), tokenizer=ByteTokenizer(), depth_bank=7)


def test_control_is_given_to_the_routers():
    bank = Scripted([[1, 0, 2]])
    llm = LLM(MODELS["dense"], depth_bank=bank, **PLENTY)
    llm.engine.runner.depths.control = 0.25
    [answer] = llm.generate([PROMPTS[0]], SAMPLING, routes_depth=True)
    assert answer.output.path == (0, 2, 2)
    assert [(layer, x.shape, mask.tolist(), control) for layer, x, mask, control in bank.shown] == [
        (layer, (1, 6, 32), [[True] * 6], 0.25) for layer in range(3)
    ]
    llm.close()


@pytest.mark.parametrize(("max_depth", "path"), [(None, (0, 0, 1, 1, 2, 2)), (4, (0, 0, 1, 2)), (3, (0, 1, 2))])
def test_blocks_are_repeated_where_there_is_room(max_depth, path):
    model, config = MODELS["dense"], {} if max_depth is None else {"max_depth": max_depth}
    llm = LLM(model, depth_bank=Scripted([[2, 2, 2]]), **PLENTY, **config)
    assert (llm.engine.info.max_depth, llm.engine.info.num_layers) == (max_depth or 6, 3)
    [answer] = llm.generate([PROMPTS[0]], SAMPLING, routes_depth=True)
    assert answer.output.path == path
    assert answer.tokens == uncached(model, PROMPTS[0], path)
    llm.close()


def test_a_skipped_block_makes_room():
    llm = LLM(MODELS["dense"], depth_bank=Scripted([[0, 2, 1]]), max_depth=3, **PLENTY)
    [answer] = llm.generate([PROMPTS[0]], SAMPLING, routes_depth=True)
    assert answer.output.path == (1, 1, 2)
    assert answer.tokens == uncached(MODELS["dense"], PROMPTS[0], (1, 1, 2))
    llm.close()


def test_a_request_that_routers_cannot_decide_ends_alone():
    class Picky(ByState):
        def decide(self, layer, x_BLD, mask_BL, control):
            if x_BLD.shape[1] == 1:
                raise ConfigError("too short to decide")
            return super().decide(layer, x_BLD, mask_BL, control)

    model = MODELS["dense"]
    llm = LLM(model, depth_bank=Picky(), **PLENTY)
    for number in (0, 1):
        llm._loop.put(Add(Request(id=str(number), prompt=PROMPTS[number], sampling=SAMPLING, routes_depth=True)))
    llm._loop.run(until_idle=True)
    ends = {event.id: event.error for event in llm._events if isinstance(event, Output) and event.finish}
    assert ends["0"] is None
    assert "too short to decide" in ends["1"]
    [answer] = llm.generate([PROMPTS[1]], SAMPLING)
    assert answer.tokens == uncached(model, PROMPTS[1], None)
    llm.close()


@pytest.mark.parametrize("limits", [PLENTY, SCARCE], ids=["plenty", "scarce"])
def test_a_trace_of_a_routed_request_is_that_of_its_path(limits):
    model, prompt = MODELS["experts"], PROMPTS[0]

    def decisions(recorder):
        columns = ("layer", "position", "rank", "token", "destination")
        return sorted(tuple(row[name] for name in columns) for row in recorder.trace().table.to_pylist())

    llm = LLM(model, depth_bank=ByState(), **limits)
    with record_routing(model) as ours:
        [answer] = llm.generate([prompt], SAMPLING, routes_depth=True)
    path = chosen(model, prompt)
    assert answer.output.path == path
    with record_routing(model) as theirs, torch.no_grad():
        model(torch.tensor([[*prompt, *answer.tokens[:-1]]]), path=path)
    assert decisions(ours) == decisions(theirs)
    llm.close()


@pytest.mark.parametrize("depth", [{"path": (0, 2, 2)}, {"routes_depth": True}])
def test_experts_of_tokens_are_told_on_any_path(depth):
    def make_runner(*given, **more):
        return ModelRunner(*given, use_kernel=False, **more)

    found = []
    for more in ({}, {"make_runner": make_runner}):
        llm = LLM(MODELS["experts"], depth_bank=ByState(), **PLENTY, **more)
        [answer] = llm.generate([PROMPTS[0]], SAMPLING, record_routing=True, **depth)
        found.append((answer.tokens, answer.output.routing))
        llm.close()
    assert found[0] == found[1]
    path = depth.get("path") or chosen(MODELS["experts"], PROMPTS[0])
    assert [sorted(route) for route in found[0][1]] == [sorted(set(path))] * 6


@pytest.mark.parametrize("limits", [PLENTY, SCARCE], ids=["plenty", "scarce"])
def test_each_request_says_how_deep_routers_go_for_it(limits):
    """Side by side, each is what it is alone; who says nothing has the engine's control."""
    model = MODELS["dense"]
    wanted = {-1: (), 0.5: (0, 1, 2), 1: (0, 0, 1, 1, 2, 2), None: (0, 1, 2)}
    llm = LLM(model, depth_bank=ByControl(), **{**limits, "num_blocks": 60})
    llm.engine.runner.depths.control = 0.5
    asked = {
        f"{control} {number}": (control, prompt) for number, prompt in enumerate(PROMPTS) for control in (*wanted, -0.5)
    }
    for id, (control, prompt) in asked.items():
        llm._loop.put(Add(Request(id=id, prompt=prompt, sampling=SAMPLING, routes_depth=True, depth_control=control)))
    llm._loop.run(until_idle=True)
    found = dict.fromkeys(asked, ((), None))
    for event in (event for event in llm._events if isinstance(event, Output)):
        tokens, path = found[event.id]
        found[event.id] = (tokens + event.tokens, path if event.path is None else event.path)
    for id, (control, prompt) in asked.items():
        path = wanted.get(control, chosen(model, prompt))
        assert found[id] == (uncached(model, prompt, path), path), id
    llm.close()


@pytest.mark.parametrize("most", [3, 4, 5])
def test_no_control_goes_deeper_than_there_is_memory_for(most):
    """Blocks are repeated from the first on, while those that follow have room."""
    model = MODELS["dense"]
    llm = LLM(model, depth_bank=ByControl(), max_depth=most, **PLENTY)
    path = {3: (0, 1, 2), 4: (0, 0, 1, 2), 5: (0, 0, 1, 1, 2)}[most]
    for prompt in PROMPTS[:2]:
        [answer] = llm.generate([prompt], SAMPLING, routes_depth=True, depth_control=1)
        assert (answer.output.path, answer.tokens) == (path, uncached(model, prompt, path))
    llm.close()


@pytest.mark.parametrize("control", [1.01, -2, float("nan"), float("inf"), True, "0", [0]])
def test_a_control_that_cannot_be_is_refused(control):
    llm = LLM(MODELS["dense"], depth_bank=ByState(), **PLENTY)
    with pytest.raises(InputError, match=r"depth_control is .*; it must be a number from -1"):
        llm.generate([PROMPTS[0]], SAMPLING, routes_depth=True, depth_control=control)
    with pytest.raises(InputError, match="depth_control is set, and routes_depth is not"):
        llm.generate([PROMPTS[0]], SAMPLING, depth_control=control)
    assert llm.generate([PROMPTS[0]], SAMPLING)[0].tokens == uncached(MODELS["dense"], PROMPTS[0], None)
    llm.close()


def test_what_cannot_be_is_refused():
    model = MODELS["dense"]
    plain = LLM(model, **PLENTY)
    with pytest.raises(InputError, match="the engine has no depth routers"):
        plain.generate([PROMPTS[0]], SAMPLING, routes_depth=True)
    assert (plain.engine.info.max_depth, plain.engine.info.routes_depth, plain.engine.info.depth) == (
        None,
        False,
        "full",
    )
    llm = LLM(model, depth_bank=ByState(), **PLENTY)
    assert (llm.engine.info.routes_depth, llm.engine.info.depth) == (True, "routed")
    with pytest.raises(InputError, match="path says which blocks run; leave one of them out"):
        llm.generate([PROMPTS[0]], SAMPLING, routes_depth=True, path=(0,))
    with pytest.raises(InputError, match="routes_depth is 1; it must be True or False"):
        llm.generate([PROMPTS[0]], SAMPLING, routes_depth=1)
    for one in (plain, llm):
        one.close()


def test_adapters_go_with_any_depth(tmp_path):
    """A request with an adapter is routed by what the adapter makes of its prompt, and is as alone, in pieces or whole."""
    model, prompt, other = make_model(), PROMPTS[2], PROMPTS[4]
    make_adapter(tmp_path / "a", layers_of(), seed="a", rank=4)
    adapted = load_peft(tmp_path / "a", copy.deepcopy(model))
    wanted = {}
    for name, one in ((None, model), ("a", adapted)):
        for ids in (prompt, other):
            path = chosen(one, ids)
            wanted[name, ids] = path, uncached(one, ids, path)
            wanted[name, ids, "path"] = uncached(one, ids, (0, 1, 1))
    for limits in (PLENTY, SCARCE):
        adapters = AdaptersConfig(load=(f"a={tmp_path / 'a'}",))
        config = ServingConfig(**{**limits, "num_blocks": 60}, dtype="float32", adapters=adapters)
        runs = Runs(Engine.of(copy.deepcopy(model), config, depth_bank=ByState()))
        asked = [key for key in wanted if len(key) == 2] * 2
        ids = {runs.put(*key, max_tokens=6, routes_depth=True): key for key in asked}
        fixed = {runs.put(*key, max_tokens=6, path=(0, 1, 1)): key for key in asked}
        found = runs.outputs()
        for id, key in ids.items():
            assert (found[id].path, found[id].tokens) == wanted[key]
        for id, key in fixed.items():
            assert found[id].tokens == wanted[(*key, "path")]


def test_experts_that_come_on_demand_go_with_routed_depth(tmp_path):
    model = MODELS["experts"]
    save_model(tmp_path / "model", model, ByteTokenizer())
    folder = saved_bank(tmp_path / "routers", model, seed=3)
    bank = DepthRouter.attach(model, folder).bank
    llm = LLM(
        tmp_path / "model", expert_budget="48KiB", dtype="float32", num_blocks=50, depth=DepthConfig(routers=folder)
    )
    for prompt in PROMPTS:
        path = chosen(model, prompt, bank)
        [answer] = llm.generate([prompt], SAMPLING, routes_depth=True)
        assert (answer.output.path, answer.tokens) == (path, uncached(model, prompt, path))
    llm.close()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"control": 0.5}, "depth.control is 0.5, but depth.routers is not set"),
        ({"usual": "full"}, "depth.usual is 'full', but depth.routers is not set"),
        ({"routers": "x", "control": 1.5}, "control"),
        ({"routers": "x", "control": float("nan")}, "control"),
        ({"routers": "x", "usual": "deep"}, "usual"),
    ],
)
def test_wrong_configs(fields, message):
    with pytest.raises(ConfigError, match=message):
        DepthConfig(**fields)


def test_visits_of_an_open_path_are_where_they_are_of_the_same_known():
    early = VisitSlots(3, range(3), is_open=True)
    early.of(0, 0)
    with pytest.raises(CapacityError, match="layer 0 is visited once more"):
        early.of(0, 1)  # Layers behind it may still come.
    for path in ((0, 1, 2), (1, 1, 2), (0, 2, 2), (2, 2), (0, 0, 2, 2)):
        for depth in (3, 4, 6):
            if len(path) > depth:
                continue
            known, found = VisitSlots(depth, range(3), path), VisitSlots(depth, range(3), is_open=True)
            seen = [(layer, path[:place].count(layer)) for place, layer in enumerate(path)]
            slots = [known.of(*visit) for visit in seen]
            assert [found.of(*visit) for visit in seen] == slots, (path, depth)
            assert len(set(slots)) == len(path)
            assert all(slot == layer for slot, (layer, visit) in zip(slots, seen, strict=True) if not visit)


@pytest.mark.parametrize(
    "kernel", [pytest.param(True, marks=pytest.mark.skipif(kernels.load() is None, reason="no compiler")), False]
)
def test_a_block_runs_once_for_all_requests_that_come_to_it(kernel, monkeypatch):
    def make_runner(*given, **more):
        return ModelRunner(*given, use_kernel=kernel, **more)

    paths, ran = [None, (0, 2), (0, 1, 1, 2), (0, 1, 2)], []
    model = MODELS["dense"]
    llm = LLM(model, make_runner=make_runner, max_depth=4, **PLENTY)
    if kernel:
        run = CompiledStep.run

        def noted(self, visits, numbers=None):
            ran.append([layer for layer, _ in visits])
            run(self, visits, numbers)

        monkeypatch.setattr(CompiledStep, "run", noted)
    else:
        for number, block in enumerate(model.blocks):
            plain = block.forward
            monkeypatch.setattr(
                block, "forward", lambda *given, number=number, plain=plain: ran.append([number]) or plain(*given)
            )
    for number, path in enumerate(paths):
        asked = Sampling(temperature=0.0, max_tokens=1, ignore_eos=True)
        llm._loop.put(Add(Request(id=str(number), prompt=PROMPTS[number], sampling=asked, path=path)))
    llm._loop.run(until_idle=True)
    assert [layer for part in ran for layer in part] == [0, 1, 1, 2]
    llm.close()


def test_a_neighbour_of_another_path_changes_no_bit_of_a_dense_model():
    def make_runner(*given, **more):
        return ModelRunner(*given, use_kernel=False, **more)

    def scores(asked):
        llm = LLM(MODELS["dense"], make_runner=make_runner, deterministic=True, max_depth=4, **PLENTY)
        for number, path in asked:
            sampling = Sampling(temperature=0.0, max_tokens=4, ignore_eos=True, logprobs=0)
            llm._loop.put(Add(Request(id=str(number), prompt=PROMPTS[number], sampling=sampling, path=path)))
        llm._loop.run(until_idle=True)
        found = {}
        for event in (event for event in llm._events if isinstance(event, Output)):
            found.setdefault(event.id, []).extend(told.logprob for told in event.logprobs)
        llm.close()
        return found

    asked = list(enumerate([None, (0, 2), (0, 1, 1, 2), (2, 1)]))
    beside = scores(asked)
    assert {id: found for one in asked for id, found in scores([one]).items()} == beside


def steps(scheduler, runner, most=None):
    """(tokens, paths that were told) of one request, for so many steps, or until it has ended."""
    tokens, told = [], []
    while scheduler.has_work and (most is None or most > 0):
        batch = scheduler.schedule()
        for output in scheduler.update(batch, runner.run(batch)):
            assert output.error is None, output.error
            tokens += output.tokens
            told += [] if output.path is None else [output.path]
        most = None if most is None else most - 1
    return tuple(tokens), told


def engine_of(model, bank, limits, **more):
    return Engine.of(model, ServingConfig(**{**limits, "num_blocks": 60}), depth_bank=bank, **more)


@pytest.mark.parametrize("limits", [PLENTY, SCARCE], ids=["plenty", "scarce"])
@pytest.mark.parametrize("count", [0, 1, 4])
def test_routers_see_nothing_that_a_request_was_given_elsewhere(limits, count):
    """It is computed anew, of its prompt and the tokens that it has, and its path is that of the prompt."""
    model, prompt = MODELS["dense"], PROMPTS[2]
    path = chosen(model, prompt)
    tokens = uncached(model, prompt, path)
    assert chosen(model, prompt + tokens[:4]) != path, "what comes behind would be seen"
    engine = engine_of(model, ByState(), limits)
    engine.scheduler.add(Request(id="a", prompt=prompt, sampling=SAMPLING, routes_depth=True), tokens[:count])
    assert steps(engine.scheduler, engine.runner) == (tokens[count:], [path])
    engine.runner.close()


@pytest.mark.parametrize("limits", [PLENTY, SCARCE], ids=["plenty", "scarce"])
@pytest.mark.parametrize("after", range(1, 6))
def test_paths_go_with_what_is_stored_along_them(limits, after):
    """Between any two steps, to an engine whose own routers would choose otherwise."""
    model, prompt = MODELS["dense"], PROMPTS[2]
    path = chosen(model, prompt)
    assert path != (0, 0, 1, 1, 2, 2)
    first = engine_of(model, ByState(), limits)
    request = Request(id="a", prompt=prompt, sampling=SAMPLING, routes_depth=True)
    first.scheduler.add(request)
    begun, told = steps(first.scheduler, first.runner, after)
    scheduler, decided = thaw(freeze(first.scheduler, first.runner.requests.handed_over()))
    second = engine_of(model, Scripted([[2, 2, 2]]), limits, pool=first.runner.pool)
    second.runner.requests.take_over(decided)
    second.runner.run(Batch(step=-1, chunks=(), new=(request,)))
    # And on, from there.
    assert second.runner.requests.handed_over() == decided
    rest, later = steps(scheduler, second.runner)
    assert (begun + rest, told + later) == (uncached(model, prompt, path), [path])
    for engine in (first, second):
        engine.runner.close()


@pytest.mark.parametrize("is_known", [True, False])
def test_an_id_that_comes_again_behind_a_handover_is_routed_anew(is_known):
    """Whether its first request was added here before it ended, or not."""
    model = MODELS["dense"]
    ask = lambda prompt: Request(id="a", prompt=prompt, sampling=SAMPLING, routes_depth=True)  # noqa: E731
    first = engine_of(model, ByState(), PLENTY)
    first.scheduler.add(ask(PROMPTS[0]))
    steps(first.scheduler, first.runner, 1)
    scheduler, decided = thaw(freeze(first.scheduler, first.runner.requests.handed_over()))
    assert decided == {"a": (chosen(model, PROMPTS[0]), False)}
    second = engine_of(model, ByState(), PLENTY, pool=first.runner.pool)
    second.runner.requests.take_over(decided)
    if is_known:
        second.runner.run(Batch(step=-1, chunks=(), new=(ask(PROMPTS[0]),)))
    scheduler.abort("a")
    # As nobody has it any more, nothing is handed on.
    assert thaw(freeze(scheduler, second.runner.requests.handed_over()))[1] == {}
    scheduler.add(ask(PROMPTS[4]))
    path = chosen(model, PROMPTS[4])
    assert path != decided["a"][0]
    assert steps(scheduler, second.runner) == (uncached(model, PROMPTS[4], path), [path])
    for engine in (first, second):
        engine.runner.close()


def test_what_is_handed_over_goes_to_whom_it_is_for():
    """Routed and pruned requests of one engine, which go on in another that would decide otherwise."""
    model = MODELS["dense"]
    skipper = TokenSkipper(model, (0.0, 0.5, 0.5))
    asked = {
        "routed": Request(id="routed", prompt=PROMPTS[0], sampling=SAMPLING, routes_depth=True),
        "pruned": Request(id="pruned", prompt=PROMPTS[2], sampling=SAMPLING, skips_tokens=True),
        "own": Request(id="own", prompt=PROMPTS[4], sampling=SAMPLING, path=(0, 2)),
    }
    first = engine_of(model, ByState(), PLENTY, skipper=skipper)
    for request in asked.values():
        first.scheduler.add(request)
    given = dict.fromkeys(asked, ())

    def run(scheduler, runner, most):
        while scheduler.has_work and most:
            batch = scheduler.schedule()
            for output in scheduler.update(batch, runner.run(batch)):
                assert output.error is None, output.error
                given[output.id] += output.tokens
            most -= 1

    run(first.scheduler, first.runner, 2)
    scheduler, decided = thaw(freeze(first.scheduler, first.runner.requests.handed_over()))
    assert set(decided) == {"routed", "pruned"}
    other = TokenSkipper(model, (0.0, 0.8, 0.1))
    assert other.generate(list(PROMPTS[2]), SAMPLING.max_tokens) != skipper.generate(
        list(PROMPTS[2]), SAMPLING.max_tokens
    )
    second = engine_of(model, Scripted([[2, 2, 2]]), PLENTY, skipper=other, pool=first.runner.pool)
    second.runner.requests.take_over(decided)
    second.runner.run(Batch(step=-1, chunks=(), new=tuple(asked.values())))
    run(scheduler, second.runner, -1)
    assert given == {
        "routed": uncached(model, PROMPTS[0], chosen(model, PROMPTS[0])),
        "pruned": tuple(skipper.generate(list(PROMPTS[2]), SAMPLING.max_tokens)),
        "own": uncached(model, PROMPTS[4], (0, 2)),
    }
    for engine in (first, second):
        engine.runner.close()


@pytest.mark.parametrize(
    ("name", "path", "says"),
    [
        ("dense", (0, 0, 1, 2), "path has 4 visits of blocks; the engine keeps keys and values of 3 "),
        (
            "window",
            (1, 1),
            "path has 2 visits of blocks that see equally far back; the engine keeps keys and values of 1 ",
        ),
    ],
)
def test_a_path_that_is_too_long_says_what_there_is_room_for(name, path, says):
    llm = LLM(MODELS[name], num_blocks=60, block_tokens=4)
    with pytest.raises(InputError, match=says + r"\(engine\.max_depth\)"):
        llm.generate([PROMPTS[0]], SAMPLING, path=path)
    assert llm.generate([PROMPTS[0]], SAMPLING, path=(0, 1, 2))[0].tokens == uncached(MODELS[name], PROMPTS[0], None)
    llm.close()
