"""Prompts that blocks pass over in parts (FTP), in one continuous batch with others: each request gets what its skipper gives alone."""

import functools

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from adapter_models import make_adapter
from anabranch.adapters import load_peft
from anabranch.data import ByteTokenizer
from anabranch.depth import path_of
from anabranch.depth.ftp import FactorConfig, RouterConfig, TokenSkipper
from anabranch.errors import CheckpointError, ConfigError, InputError
from anabranch.lm import Decoder, save_model
from anabranch.nn import MoE, Rotary, SelfAttention, SwiGLU, kernels
from anabranch.routing import record_routing
from anabranch.serving import LLM, Output, Request, Sampling
from anabranch.serving.adapters import AdaptersConfig
from anabranch.serving.config import ServingConfig
from anabranch.serving.core.batch import Batch
from anabranch.serving.core.hooks import RequestOverride
from anabranch.serving.depth import DepthConfig
from anabranch.serving.elasticmoe.handover import freeze, thaw
from anabranch.serving.engine.engine import Engine
from anabranch.serving.engine.kinds import Kinds
from anabranch.serving.engine.messages import Add
from anabranch.serving.engine.runner import ModelRunner
from anabranch.serving.engine.skips import Choosing
from depth_banks import ByState
from served_adapters import Runs, layers_of, make_model
from skipped_models import router

LAYERS = 5
# The third block decodes nothing, the fourth does not run.
SCHEDULE = (0.0, 0.3, 0.6, 1.0, 0.4)
PLENTY = {"num_blocks": 300, "block_tokens": 4}
SCARCE = {"num_blocks": 14, "block_tokens": 4, "max_batched_tokens": 9, "max_seqs": 4, "long_prefill_chunk": 5}
SAMPLING = Sampling(temperature=0.0, max_tokens=6, ignore_eos=True)
PROMPTS = [
    (1, 2, 3, 4, 5, 6),
    (7,),
    (8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 3, 2, 1),
    (30, 2),
    (5, 5, 5, 5, 9, 9, 9, 5),
]


HEADS = {"num_heads": 4, "num_kv_heads": 2}


def built(feed_forward, local=None, **attention):
    config = Decoder.Config(
        vocab_size=31,
        dim=64,
        num_layers=LAYERS,
        max_positions=128,
        init_std=0.3,
        feed_forward=feed_forward,
        attention=SelfAttention.Config(**HEADS, **attention),
        **(local or {}),
    )
    return config.build(seed=0).eval()


# As Mistral's, all layers have a window; as Gemma 3's, most have one and a base of their own for positions.
LOCAL = {
    "local_layers": (1, 2, 4),
    "local_attention": SelfAttention.Config(**HEADS, window=3, rotary=Rotary.Config(theta=100.0), qk_norm="head"),
}


@functools.cache
def model_of(name):
    return {
        # Which the compiled step runs; and experts, and attention that it does not know.
        "dense": lambda: built(SwiGLU.Config(hidden_dim=64)),
        "experts": lambda: built(MoE.Config(num_experts=4, hidden_dim=32)),
        "sinks": lambda: built(SwiGLU.Config(hidden_dim=64), sinks=True),
        "window": lambda: built(SwiGLU.Config(hidden_dim=64), window=4),
        "some windows": lambda: built(SwiGLU.Config(hidden_dim=64), LOCAL, qk_norm="head"),
    }[name]()


WINDOWS = ("window", "some windows")


SKIPPERS = {
    "places": lambda model: TokenSkipper(model, SCHEDULE, "static"),
    "chance": lambda model: TokenSkipper(model, SCHEDULE, "random", seed=5),
    "learned": lambda model: TokenSkipper(model, SCHEDULE, router()),
    "threshold": lambda model: TokenSkipper(model, SCHEDULE, router(), mode="threshold"),
    "once": lambda model: TokenSkipper(model, SCHEDULE, router(), one_pass=True),
    "seldom": lambda model: TokenSkipper(model, SCHEDULE, router(), factors=FactorConfig(refresh=2)),
    "causal": lambda model: TokenSkipper(
        model, SCHEDULE, router(), mode="threshold", factors=FactorConfig(causal=True)
    ),
    "states": lambda model: TokenSkipper(
        model, SCHEDULE, router(config=RouterConfig(inputs="hidden", dim=64)), mode="threshold"
    ),
    # Keys and values of tokens that blocks pass over are made all the same.
    "kept places": lambda model: TokenSkipper(model, SCHEDULE, "static", kv="keep"),
    "kept learned": lambda model: TokenSkipper(model, SCHEDULE, router(), kv="keep"),
    "kept threshold": lambda model: TokenSkipper(model, SCHEDULE, router(), mode="threshold", kv="keep"),
}


def alone(skipper, prompt):
    """(tokens, tokens of the prompt that each block computed): by the skipper itself, and nothing of an engine."""
    computed = tuple(skipper.prefill(list(prompt)).keep_IBL[:, 0].sum(1).tolist())
    return tuple(skipper.generate(list(prompt), SAMPLING.max_tokens)), computed


@torch.no_grad()
def whole(model, prompt, path=None):
    """Greedy tokens of the model, or of some blocks of it, without a cache."""
    tokens = list(prompt)
    for _ in range(SAMPLING.max_tokens):
        tokens.append(int(model(torch.tensor([tokens]), path=path, last_only=True).logits_BLV[0, -1].argmax()))
    return tuple(tokens[len(prompt) :])


def run(llm, asked):
    """The joined outputs of requests that come all at once: ``asked`` are (id, prompt, fields)."""
    for id, prompt, fields in asked:
        llm._loop.put(Add(Request(id=id, prompt=prompt, sampling=SAMPLING, **fields)))
    llm._loop.run(until_idle=True)
    found = {id: ((), None, None) for id, _, _ in asked}
    for event in (event for event in llm._events if isinstance(event, Output)):
        assert event.error is None, event.error
        tokens, path, computed = found[event.id]
        assert computed is None or event.computed is None, "it is told once"
        found[event.id] = (tokens + event.tokens, event.path or path, event.computed or computed)
    llm._events.clear()
    return found


# Each router, model, way and size once; all of them by make test-all.
USUAL = {
    ("learned", "dense", True, "plenty"),
    ("learned", "dense", True, "scarce"),
    ("learned", "dense", False, "scarce"),
    ("places", "dense", True, "scarce"),
    ("threshold", "experts", True, "plenty"),
    ("once", "sinks", False, "scarce"),
    ("states", "dense", True, "scarce"),
    ("seldom", "dense", True, "plenty"),
    ("learned", "window", False, "scarce"),
    ("places", "some windows", True, "scarce"),
    ("learned", "some windows", True, "plenty"),
    ("kept learned", "dense", True, "plenty"),
    ("kept learned", "dense", False, "scarce"),
    ("kept places", "dense", True, "scarce"),
    ("kept threshold", "experts", True, "scarce"),
    ("kept places", "window", False, "scarce"),
    ("kept learned", "some windows", True, "scarce"),
    ("kept learned", "sinks", False, "plenty"),
}


@pytest.mark.parametrize(
    ("skips", "name", "kernel", "limits"),
    [
        pytest.param(
            skips,
            name,
            kernel,
            limits,
            id=f"{skips} {name} {'compiled' if kernel else 'modules'} {size}",
            marks=[] if (skips, name, kernel, size) in USUAL else [pytest.mark.slow],
        )
        for skips in SKIPPERS
        for name in ("dense", "experts", "sinks", *WINDOWS)
        for kernel in (True, False)
        for size, limits in (("plenty", PLENTY), ("scarce", SCARCE))
    ],
)
def test_pruned_beside_every_depth_is_each_request_alone(skips, name, kernel, limits):
    def make_runner(*given, **more):
        return ModelRunner(*given, use_kernel=kernel, **more)

    model = model_of(name)
    skipper = SKIPPERS[skips](model)
    llm = LLM(model, depth_bank=ByState(), skipper=skipper, make_runner=make_runner, **limits)
    # Routers decide by all that they see, so they are compared elsewhere; here they are company.
    depths = {
        "pruned": {"skips_tokens": True},
        "full": {},
        "path": {"path": (0, 2, 2)},
        "routed": {"routes_depth": True},
    }
    asked = [
        (f"{depth} {number}", prompt, fields)
        for number, prompt in enumerate(PROMPTS)
        for depth, fields in depths.items()
    ]
    found = run(llm, asked)
    for id, prompt, fields in asked:
        tokens, path, computed = found[id]
        if fields == {"skips_tokens": True}:
            assert (tokens, computed) == alone(skipper, prompt), id
            assert path == (0, 1, 4)
        elif "routes_depth" not in fields:
            assert (tokens, computed) == (whole(model, prompt, fields.get("path")), None), id
    computed = [found[f"pruned {number}"][2] for number in range(len(PROMPTS))]
    is_known = name not in ("sinks", *WINDOWS) and kernels.load() is not None
    assert (llm.engine.runner.fast is not None) == (kernel and is_known)
    assert any(0 < count < len(prompt) for counts, prompt in zip(computed, PROMPTS, strict=True) for count in counts)
    llm.close()


class ByLength:
    """Depth routers that look at how long a prompt is: nothing that rounding could change."""

    def decide(self, layer, x_BLD, mask_BL, control):
        decision_B = (mask_BL.sum(1) + layer) % 3
        return decision_B, torch.nn.functional.one_hot(decision_B, 3).float()


def routed(prompt):
    """The path that they choose."""
    return path_of([(len(prompt) + layer) % 3 for layer in range(LAYERS)])


@functools.cache
def engine_of(skips, size):
    """An engine that lives on, so that each example comes after others, with what they left in memory and in the prefix cache."""
    model = model_of("dense")
    limits = {"plenty": PLENTY, "scarce": SCARCE}[size]
    return LLM(model, skipper=SKIPPERS[skips](model), depth_bank=ByLength(), **limits)


@functools.cache
def alone_of(skips, prompt):
    return alone(engine_of(skips, "plenty").engine.runner.skips.skipper, prompt)


@functools.cache
def whole_of(prompt, path):
    return whole(model_of("dense"), prompt, path)


PROMPT = st.lists(st.integers(0, 30), min_size=1, max_size=16).map(tuple)
# Prompts of few beginnings, so that neighbours begin alike and would share what they must not.
ALIKE = st.tuples(st.sampled_from([(1, 2, 3, 4, 5, 6, 7, 8), (9,) * 8]), PROMPT).map(lambda parts: parts[0] + parts[1])
DEPTH = st.sampled_from(["pruned", "pruned", "routed", "full", "path"])
FIELDS = {
    "pruned": {"skips_tokens": True},
    "routed": {"routes_depth": True},
    "full": {},
    "path": {"path": (0, 1, 1, 4)},
}
SAME = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12)


@settings(max_examples=15)
@given(
    skips=st.sampled_from(["places", "learned", "kept places", "kept learned"]),
    size=st.sampled_from(["plenty", "scarce"]),
    rounds=st.lists(st.lists(st.tuples(DEPTH, PROMPT | ALIKE), min_size=1, max_size=5), min_size=1, max_size=3),
)
@example(
    skips="learned", size="plenty", rounds=[[("full", SAME)], [("pruned", SAME)], [("full", SAME), ("pruned", SAME)]]
)
@example(skips="learned", size="scarce", rounds=[[("pruned", SAME)] * 3 + [("full", SAME), ("routed", SAME)]])
def test_whoever_is_there_or_was_changes_nothing(skips, size, rounds):
    """Neighbours with the same beginning, in the same step or before, who run all blocks, some, or what they pass over."""
    llm = engine_of(skips, size)
    for asked in rounds:
        found = run(llm, [(f"{number}", prompt, FIELDS[depth]) for number, (depth, prompt) in enumerate(asked)])
        for number, (depth, prompt) in enumerate(asked):
            tokens, path, computed = found[f"{number}"]
            if depth == "pruned":
                assert (tokens, computed) == alone_of(skips, prompt)
            elif depth == "routed":
                assert (tokens, path) == (whole_of(prompt, routed(prompt)), routed(prompt) or None)
            else:
                assert tokens == whole_of(prompt, FIELDS[depth].get("path"))


def test_nothing_is_shared_with_a_pruned_prompt():
    model, prompt = model_of("dense"), PROMPTS[2]
    llm = LLM(model, skipper=SKIPPERS["places"](model), **PLENTY)
    cached = []
    for fields in ({"skips_tokens": True}, {}, {"skips_tokens": True}, {}):
        [answer] = llm.generate([prompt], SAMPLING, **fields)
        cached.append(answer.output.cached_tokens)
    assert cached == [0, 0, 0, 12]
    reset = llm.engine.controls["reset_prefix_cache"]
    reset()
    llm.generate([prompt], SAMPLING, skips_tokens=True)
    assert reset() == 0, "nobody could find what is kept"
    llm.close()


@pytest.mark.skipif(kernels.load() is None, reason="no compiler")
@pytest.mark.parametrize("limits", [PLENTY, SCARCE], ids=["plenty", "scarce"])
@pytest.mark.parametrize("skips", ["learned", "kept learned"])
def test_blocks_are_compiled_and_run_what_is_kept(skips, limits, monkeypatch):
    """Modules are asked for queries, keys and values alone, and no block of the compiled step gets a row that it passes over."""
    from anabranch.serving.fast.paths import CompiledStep

    model = model_of("dense")
    skipper = SKIPPERS[skips](model)
    wanted = alone(skipper, PROMPTS[2])
    llm, rows = LLM(model, skipper=skipper, **limits), [0] * LAYERS
    was = CompiledStep.run_on

    def counted(self, visits, row_R, sequence_M4, table_U):
        rows[visits[0][0]] += int(sequence_M4[:, 1].sum())
        was(self, visits, row_R, sequence_M4, table_U)

    monkeypatch.setattr(CompiledStep, "run_on", counted)
    for block in model.blocks:
        monkeypatch.setattr(block.feed_forward, "forward", lambda *_, **__: pytest.fail("modules"))
    [answer] = llm.generate([PROMPTS[2]], SAMPLING, skips_tokens=True)
    assert (answer.tokens, answer.output.computed) == wanted
    new = SAMPLING.max_tokens - 1
    assert rows == [count + new * (layer in answer.output.path) for layer, count in enumerate(answer.output.computed)]
    llm.close()


@pytest.mark.parametrize("kernel", [True, False], ids=["compiled", "modules"])
def test_keys_that_are_kept_are_looked_at(kernel, monkeypatch):
    """The router's table is of attention to all that a block has, also to what it passes over."""
    handed, was = [], Choosing.looked

    def looked(self, layer, query_1HRD, key_1GRD, looks, passed_1GSD=None):
        handed.append((len(self.passed(layer)), 0 if passed_1GSD is None else passed_1GSD.shape[2]))
        was(self, layer, query_1HRD, key_1GRD, looks, passed_1GSD)

    monkeypatch.setattr(Choosing, "looked", looked)
    model = model_of("dense")
    llm = LLM(
        model,
        skipper=SKIPPERS["kept learned"](model),
        make_runner=lambda *given, **more: ModelRunner(*given, use_kernel=kernel, **more),
        **PLENTY,
    )
    llm.generate([PROMPTS[2]], SAMPLING, skips_tokens=True)
    assert all(wanted == count for wanted, count in handed)
    assert any(wanted for wanted, _ in handed)
    llm.close()


def test_a_prompt_in_pieces_runs_once(monkeypatch):
    """Its pieces take what was computed when it was decided about."""
    model = model_of("dense")
    llm = LLM(model, skipper=SKIPPERS["learned"](model), **{**SCARCE, "num_blocks": 40})
    asked = []
    passes = llm.engine.runner._pruned.passes
    was = passes.hidden
    monkeypatch.setattr(
        passes, "hidden", lambda chunks, *given, **more: asked.append(chunks) or was(chunks, *given, **more)
    )
    llm.generate([PROMPTS[2]], SAMPLING, skips_tokens=True)
    assert [len(chunk.tokens) for chunks in asked for chunk in chunks] == [1] * (SAMPLING.max_tokens - 1)
    assert not llm.engine.runner._pruned.ahead
    llm.close()


def test_of_prompts_in_pieces_what_was_computed_is_kept_for_one():
    """Others run again, piece by piece, and give the same: so many prompts' keys beside the cache are in no plan of memory."""
    model = model_of("dense")
    skipper = SKIPPERS["learned"](model)
    # Each prompt gets a few tokens of a step, so all are under way at a time.
    llm = LLM(model, skipper=skipper, **{**PLENTY, "max_batched_tokens": 16, "long_prefill_chunk": 4})
    prompts, most = llm.engine.runner._pruned, []
    was = prompts.passes.hidden
    prompts.passes.hidden = lambda *given, **more: most.append(len(prompts.ahead)) or was(*given, **more)
    texts = [tuple((number + 3 * place) % 29 for place in range(20)) for number in range(3)]
    answers = llm.generate(texts, SAMPLING, skips_tokens=True)
    for text, answer in zip(texts, answers, strict=True):
        assert (answer.tokens, answer.output.computed) == alone(skipper, text)
    assert max(most) == 1
    assert not prompts.ahead
    llm.close()


def steps(scheduler, runner, most=None):
    """(tokens, what was told of the prompt) of one request, for so many steps, or until it has ended."""
    tokens, told = [], []
    while scheduler.has_work and (most is None or most > 0):
        batch = scheduler.schedule()
        for output in scheduler.update(batch, runner.run(batch)):
            assert output.error is None, output.error
            tokens += output.tokens
            told += [] if output.computed is None else [output.computed]
        most = None if most is None else most - 1
    return tuple(tokens), told


@pytest.mark.parametrize("limits", [PLENTY, {**SCARCE, "num_blocks": 40}], ids=["plenty", "scarce"])
@pytest.mark.parametrize("skips", ["learned", "places", "kept learned"])
def test_what_was_begun_elsewhere_goes_on_as_it_would_have(skips, limits):
    """It is computed anew, of its prompt and the tokens that it has, of which none is taken for the prompt's."""
    model = model_of("dense")
    skipper = SKIPPERS[skips](model)
    tokens, computed = alone(skipper, PROMPTS[2])
    for count in (0, 1, 4):
        engine = Engine.of(model, ServingConfig(**limits), skipper=skipper)
        engine.scheduler.add(Request(id="a", prompt=PROMPTS[2], sampling=SAMPLING, skips_tokens=True), tokens[:count])
        assert steps(engine.scheduler, engine.runner) == (tokens[count:], [computed])
        assert not engine.runner._pruned.ahead
        engine.runner.close()


@pytest.mark.parametrize("limits", [PLENTY, {**SCARCE, "num_blocks": 40}], ids=["plenty", "scarce"])
@pytest.mark.parametrize("after", range(1, 6))
def test_decisions_go_with_what_is_stored(limits, after):
    """Between any two steps, to an engine whose own skipper would decide otherwise."""
    model = model_of("dense")
    skipper, other = SKIPPERS["learned"](model), TokenSkipper(model, SCHEDULE, router(seed=8))
    tokens, computed = alone(skipper, PROMPTS[2])
    assert alone(other, PROMPTS[2]) != (tokens, computed)
    first = Engine.of(model, ServingConfig(**limits), skipper=skipper)
    request = Request(id="a", prompt=PROMPTS[2], sampling=SAMPLING, skips_tokens=True)
    first.scheduler.add(request)
    begun, told = steps(first.scheduler, first.runner, after)
    scheduler, decided = thaw(freeze(first.scheduler, first.runner.skips.handed_over()))
    second = Engine.of(model, ServingConfig(**limits), skipper=other, pool=first.runner.pool)
    second.runner.skips.take_over(decided)
    second.runner.run(Batch(step=-1, chunks=(), new=(request,)))
    rest, later = steps(scheduler, second.runner)
    assert (begun + rest, told + later) == (tokens, [computed])


@pytest.mark.parametrize("length", [8, 5])
def test_an_id_that_comes_again_behind_a_handover_is_decided_about_anew(length):
    """Whether its first request ended in the last step before it, or behind it and before it was added there."""
    model = model_of("dense")
    skipper = SKIPPERS["places"](model)
    sampling = Sampling(temperature=0.0, max_tokens=6, ignore_eos=True)
    ask = lambda prompt: Request(id="a", prompt=prompt, sampling=sampling, skips_tokens=True)  # noqa: E731
    first = Engine.of(model, ServingConfig(**PLENTY), skipper=skipper)
    first.scheduler.add(ask((1, 2, 3, 4, 5, 6, 7, 8)))
    steps(first.scheduler, first.runner, 1)
    ended = freeze(first.scheduler, first.runner.skips.handed_over())
    first.scheduler.abort("a")
    for frozen, aborts in ((freeze(first.scheduler, first.runner.skips.handed_over()), False), (ended, True)):
        scheduler, decided = thaw(frozen)
        # Of one that has ended nothing is handed over, though nobody here has been told yet.
        assert set(decided) == ({"a"} if aborts else set())
        second = Engine.of(model, ServingConfig(**PLENTY), skipper=skipper, pool=first.runner.pool)
        second.runner.skips.take_over(decided)
        if aborts:
            scheduler.abort("a")
            second.runner.skips.forget("a")
        prompt = tuple(range(9, 9 + length))
        scheduler.add(ask(prompt))
        made, _ = steps(scheduler, second.runner)
        assert list(made) == skipper.generate(list(prompt), 6)


@pytest.mark.parametrize(
    ("name", "skips"), [("dense", "learned"), ("some windows", "learned"), ("dense", "kept learned")]
)
def test_guesses_that_do_not_hold_leave_nothing(name, skips):
    """Prompt lookup writes behind the prompt what may not come true."""
    model = model_of(name)
    skipper = SKIPPERS[skips](model)
    llm = LLM(model, skipper=skipper, prompt_lookup=4, **PLENTY)
    prompt = (5, 6, 7, 8) * 4
    sampling = Sampling(temperature=0.0, max_tokens=24, ignore_eos=True)
    [answer] = llm.generate([prompt], sampling, skips_tokens=True)
    assert answer.tokens == tuple(skipper.generate(list(prompt), 24))
    llm.close()


@pytest.mark.parametrize(("name", "skips"), [("dense", "places"), ("some windows", "places"), ("dense", "kept places")])
def test_determined_engines_give_the_same_to_the_bit(name, skips):
    """With log probabilities, which tell the last digit; alone, and beside others, by modules."""

    def make_runner(*given, **more):
        return ModelRunner(*given, use_kernel=False, **more)

    model = model_of(name)
    skipper = SKIPPERS[skips](model)
    sampling = Sampling(temperature=0.0, max_tokens=6, ignore_eos=True, logprobs=3)
    told = []
    for others in ([], [PROMPTS[0], PROMPTS[2]]):
        llm = LLM(model, skipper=skipper, deterministic=True, make_runner=make_runner, **PLENTY)
        answers = llm.generate([PROMPTS[4], *others], sampling, skips_tokens=True)
        told.append((answers[0].tokens, answers[0].output.logprobs))
        llm.close()
    assert told[0] == told[1]
    assert told[0][0] == alone(skipper, PROMPTS[4])[0]


LONG = st.lists(st.integers(0, 30), min_size=1, max_size=40).map(tuple)


@functools.cache
def windowed_engine(name, skips):
    model = model_of(name)
    return LLM(model, skipper=SKIPPERS[skips](model), **{**SCARCE, "num_blocks": 40})


@settings(max_examples=10)
@given(
    name=st.sampled_from(WINDOWS),
    skips=st.sampled_from(["learned", "kept learned"]),
    prompts=st.lists(st.tuples(st.booleans(), LONG), min_size=1, max_size=3),
)
def test_windows_are_counted_in_positions(name, skips, prompts):
    """Prompts of many windows, whole or in pieces, beside those that run all blocks: a window by what was kept would reach further."""
    llm = windowed_engine(name, skips)
    fields = {True: {"skips_tokens": True}, False: {"skips_tokens": False}}
    found = run(llm, [(f"{number}", prompt, fields[is_pruned]) for number, (is_pruned, prompt) in enumerate(prompts)])
    for number, (is_pruned, prompt) in enumerate(prompts):
        tokens, _, computed = found[f"{number}"]
        if is_pruned:
            assert (tokens, computed) == alone(llm.engine.runner.skips.skipper, prompt)
        else:
            assert tokens == whole(llm.engine.runner.model, prompt)


def test_layers_with_a_window_keep_all_that_they_compute(tmp_path):
    """What is given back behind a window would be counted in positions, and blocks of memory are filled by what is kept."""
    model = model_of("some windows")
    TokenSkipper(model, SCHEDULE).save(tmp_path / "skipper")
    config = ServingConfig(num_blocks=16, depth=DepthConfig(skipper=str(tmp_path / "skipper")))
    assert Kinds.of(model, config) == Kinds.whole(model, config) != Kinds.of(model, ServingConfig(num_blocks=16))
    for engine in (
        Engine.of(model, config),
        Engine.of(model, ServingConfig(num_blocks=16), skipper=TokenSkipper(model, SCHEDULE)),
    ):
        assert len(engine.runner.stores.pools) == 1


@pytest.mark.parametrize("kv", ["drop", "keep"])
def test_adapters_decide_with_the_model(tmp_path, kv):
    """A request with an adapter is decided about by what the adapter makes of its prompt, in pieces or whole."""
    import copy

    model = make_model()
    make_adapter(tmp_path / "a", layers_of(), seed="a", rank=4)
    schedule = (0.0, *[0.5] * (len(model.blocks) - 1))
    wanted = {}
    for name, one in ((None, model), ("a", load_peft(tmp_path / "a", copy.deepcopy(model)))):
        for prompt in (PROMPTS[2], PROMPTS[4]):
            wanted[name, prompt] = alone(TokenSkipper(one, schedule, router(), kv=kv), prompt)
    for limits in (PLENTY, SCARCE):
        adapters = AdaptersConfig(load=(f"a={tmp_path / 'a'}",))
        own = copy.deepcopy(model)
        config = ServingConfig(**{**limits, "num_blocks": 60}, dtype="float32", adapters=adapters)
        runs = Runs(Engine.of(own, config, skipper=TokenSkipper(own, schedule, router(), kv=kv)))
        ids = {runs.put(*key, max_tokens=6, scores=None, skips_tokens=True): key for key in [*wanted] * 2}
        found = runs.outputs()
        for id, key in ids.items():
            assert (found[id].tokens, found[id].computed) == wanted[key]


@pytest.mark.parametrize("limits", [PLENTY, SCARCE], ids=["plenty", "scarce"])
@pytest.mark.parametrize("skips", ["learned", "kept learned"])
def test_a_trace_has_what_blocks_computed_once(skips, limits):
    model = model_of("experts")
    llm = LLM(model, skipper=SKIPPERS[skips](model), **limits)
    with record_routing(model) as recorder:
        [answer] = llm.generate([PROMPTS[2]], SAMPLING, skips_tokens=True)
    table = recorder.trace().table.to_pylist()
    new = SAMPLING.max_tokens - 1
    for layer, count in enumerate(answer.output.computed):
        places = [row["position"] for row in table if row["layer"] == layer and row["rank"] == 0]
        assert len(places) == len(set(places)) == count + new * (layer in answer.output.path)
    assert (answer.tokens, answer.output.computed) == alone(SKIPPERS[skips](model), PROMPTS[2])
    llm.close()


def test_experts_that_come_on_demand_go_with_pruned_prompts(tmp_path):
    model = model_of("experts")
    save_model(tmp_path / "model", model, ByteTokenizer())
    skipper = SKIPPERS["threshold"](model)
    skipper.save(tmp_path / "skipper")
    llm = LLM(
        tmp_path / "model",
        expert_budget="80KiB",
        dtype="float32",
        num_blocks=50,
        depth=DepthConfig(skipper=str(tmp_path / "skipper")),
    )
    assert (llm.engine.info.depth, llm.engine.info.skips_tokens) == ("pruned", True)
    for prompt in PROMPTS:
        [answer] = llm.generate([prompt], SAMPLING, skips_tokens=True)
        assert (answer.tokens, answer.output.computed) == alone(skipper, prompt)
    llm.close()


def test_a_request_that_the_router_cannot_decide_ends_alone():
    model = model_of("dense")
    broken = router()
    broken.first.weight.fill_(float("nan"))
    llm = LLM(model, skipper=TokenSkipper(model, SCHEDULE, broken), **PLENTY)
    for number, fields in ((0, {"skips_tokens": True}), (2, {})):
        llm._loop.put(Add(Request(id=str(number), prompt=PROMPTS[number], sampling=SAMPLING, **fields)))
    llm._loop.run(until_idle=True)
    ends = {event.id: event.error for event in llm._events if isinstance(event, Output) and event.finish}
    assert "scores that are not numbers" in ends["0"]
    assert ends["2"] is None
    [answer] = llm.generate([PROMPTS[2]], SAMPLING)
    assert answer.tokens == whole(model, PROMPTS[2])
    llm.close()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"path": (0,)}, "so is path: both say what runs"),
        ({"record_routing": True}, "experts of tokens that blocks pass over are not told"),
        ({"sampling": Sampling(max_tokens=1, prompt_logprobs=0)}, "their likelihood would leak these"),
        ({"sampling": Sampling(max_tokens=0), "pooling": "mean"}, "vectors are of whole texts"),
        ({"skips_tokens": 1}, "skips_tokens is 1; it must be True or False"),
    ],
)
def test_what_does_not_go_with_it_is_refused(fields, message):
    llm = engine_of("places", "plenty")
    request = Request(**{"id": "a", "prompt": PROMPTS[0], "sampling": SAMPLING, "skips_tokens": True, **fields})
    with pytest.raises(InputError, match=message):
        llm.engine.check(request)


class Overrides:
    """A hook that says nothing of any request."""

    def before_step(self, batch, tokens): ...

    def after_step(self, batch, sampled): ...

    def close(self): ...

    def override(self, batch, tokens) -> dict[str, RequestOverride]:
        return {}


def test_what_cannot_be_served_is_refused(tmp_path):
    model = model_of("dense")
    plain = LLM(model, **PLENTY)
    with pytest.raises(InputError, match="the engine has no skipper of tokens"):
        plain.generate([PROMPTS[0]], SAMPLING, skips_tokens=True)
    assert (plain.engine.info.depth, plain.engine.info.skips_tokens) == ("full", False)
    plain.close()
    config = ServingConfig(num_blocks=16)
    with pytest.raises(ConfigError, match="of another model than the engine's"):
        Engine.of(model, config, skipper=TokenSkipper(model_of("experts"), SCHEDULE))
    with pytest.raises(ConfigError, match="hooks override single requests"):
        Engine.of(model, config, skipper=TokenSkipper(model, SCHEDULE), hooks=[Overrides()])
    other = TokenSkipper(model_of("experts"), SCHEDULE)
    other.save(tmp_path / "other")
    with pytest.raises(CheckpointError, match="of a model with fingerprint"):
        Engine.of(model, config.replace(depth=DepthConfig(skipper=str(tmp_path / "other"))))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"usual": "pruned"}, "depth.usual is 'pruned', but depth.skipper is not set"),
        ({"usual": "routed", "skipper": "x"}, "depth.usual is 'routed', but depth.routers is not set"),
        ({"control": 0.5, "skipper": "x"}, "depth.control is 0.5, but depth.routers is not set"),
    ],
)
def test_wrong_configs(fields, message):
    with pytest.raises(ConfigError, match=message):
        DepthConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "usually"),
    [
        ({"skipper": "x"}, "pruned"),
        ({"routers": "x"}, "routed"),
        ({"skipper": "x", "routers": "x"}, "routed"),
        ({"skipper": "x", "usual": "full"}, "full"),
        ({"skipper": "x", "routers": "x", "usual": "pruned"}, "pruned"),
        ({}, "full"),
    ],
)
def test_what_a_request_that_says_nothing_runs(fields, usually):
    config = DepthConfig(**fields)
    assert config.usually(routes="routers" in fields, prunes="skipper" in fields) == usually
