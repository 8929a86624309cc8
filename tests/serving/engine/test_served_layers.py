"""Routers by name, and adapters by task, in an engine: each row as alone, and as the model that has them put on."""

import copy
import functools
import gc
import warnings
import weakref

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapter_models import make_adapter, make_base, make_kind
from anabranch.adapters import catalogue, load_peft
from anabranch.adapters.glider import GliderConfig, GliderPool, describe_expert
from anabranch.adapters.glider import pool as glider_pool
from anabranch.adapters.own_folder import read_own, write_own
from anabranch.adapters.put_on import put_on
from anabranch.adapters.tasks import task_rows
from anabranch.errors import CapacityError, CheckpointError, ConfigError, InputError
from anabranch.lm import load_model
from anabranch.nn.quantize import quantize
from anabranch.routing import record_routing
from anabranch.serving import LLM, Sampling
from anabranch.serving.adapters import AdaptersConfig
from anabranch.serving.config import ServingConfig
from anabranch.serving.core.request import Finish
from anabranch.serving.engine import ModelRunner, layer_reader
from anabranch.serving.engine.adapter_place import folder_of, size_of
from anabranch.serving.engine.adapter_reader import AdapterReader
from anabranch.serving.engine.adapter_rows import Sites
from anabranch.serving.engine.engine import Engine
from anabranch.serving.engine.messages import Refused
from served_adapters import (
    DIM,
    INSTRUCTIONS,
    LAYERS_OF,
    TASKS,
    VOCAB,
    Runs,
    layers_of,
    make_adapters,
    make_model,
    make_pool,
    make_routers,
    scores,
    with_layers,
)

PROMPTS = [
    tuple((7 * at + 31 * number) % VOCAB for at in range(length)) for number, length in enumerate((21, 5, 40, 33, 2))
]
SMALL = {"num_blocks": 200, "block_tokens": 4, "max_batched_tokens": 24, "long_prefill_chunk": 9, "dtype": "float32"}
ROUTERS = ("pool", "routed_low_rank", "mixed_low_rank")
GLIDER = GliderConfig()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("routers")
    return {**make_adapters(root / "adapters"), **make_routers(root)}


@functools.cache
def model_of(kind):
    model = make_model()
    if kind == "int8":
        quantize(model, "int8")
    return model


def engine_of(folders, names, kind="compiled", *, engine=None, **options):
    """An engine whose adapters are called as their folders, ``arrow:pool`` as ``arrow``."""
    load = tuple(f"{name.partition(':')[0] or name}={_folder(folders, name)}" for name in names)
    config = ServingConfig(**{**SMALL, **options}, adapters=AdaptersConfig(load=load))
    more = {} if kind != "modules" else {"make_runner": functools.partial(ModelRunner, use_kernel=False)}
    return Runs(Engine.of(copy.deepcopy(model_of(kind)), config, **more, **(engine or {})))


_shared = {}


def shared(folders, kind="compiled", **options):
    """An engine with all of them, the same for all tests: to read what is in a folder takes a while."""
    key = (kind, *sorted(options.items()))
    if key not in _shared:
        _shared[key] = engine_of(folders, (*ALL, "huge"), kind, **{"prefix_cache": False, **options})
    return _shared[key]


def _folder(folders, name):
    kind, sign, own = name.partition(":")
    return f"{kind}:{folders[own]}" if sign else folders[name]


def put_on_it(folders, name):
    """The model with the router put on, and the pool where there is one."""
    model = make_model()
    kind, sign, own = name.partition(":")
    if own == "pool" or name == "pool":
        how = {
            "": GliderConfig(),
            "arrow": GliderConfig(local="arrow", instruction=False),
            "phatgoose": GliderConfig(instruction=False),
        }
        pool = GliderPool.load(folders["pool"], how[kind if sign else ""])
        return pool.onto(model), pool
    return read_own(folders[name], model).eval(), None


def test_what_a_client_asks_for_without_words_is_no_warning_of_the_server(folders):
    """Its vector has length 0, so the pool has no preference; a Python warning would be written for each request."""
    layers = shared(folders).engine.adapters.shelf.peek("pool")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert layers.terms("?! ...").bias is None
    assert layers.terms(INSTRUCTIONS["sql"]).bias is not None


# As the model that has it put on


@pytest.mark.parametrize("kind", ["compiled", "modules"])
@pytest.mark.parametrize("name", [*ROUTERS, "arrow:pool", "phatgoose:pool"])
def test_it_is_the_model_with_the_router_put_on(name, kind, folders):
    model, _ = put_on_it(folders, name)
    with torch.no_grad():
        wanted = model(torch.tensor([PROMPTS[2]])).logits_BLV.log_softmax(-1)[0]
    runs = shared(folders, kind)
    [output] = runs([(name.partition(":")[0] if ":" in name else name, PROMPTS[2])], max_tokens=1)
    found = [told.logprob for told in output.prompt_logprobs]
    assert found == pytest.approx([float(wanted[at, token]) for at, token in enumerate(PROMPTS[2][1:])], abs=3e-4)
    assert output.tokens == (int(wanted[-1].argmax()),)


def test_a_query_finds_its_adapters(folders):
    """The instruction's cosines come in at every layer, of each row its own."""
    model, pool = put_on_it(folders, "pool")
    runs = shared(folders)
    queries = [INSTRUCTIONS["sql"], None, "Name the law of this case", INSTRUCTIONS["sum"]]
    ids = [runs.put("pool", PROMPTS[2], max_tokens=1, instruction=query) for query in queries]
    outputs = runs.outputs()
    found = []
    for id, query in zip(ids, queries, strict=True):
        with torch.no_grad(), pool.answering([query]):
            wanted = model(torch.tensor([PROMPTS[2]])).logits_BLV.log_softmax(-1)[0]
        found.append([told.logprob for told in outputs[id].prompt_logprobs])
        assert found[-1] == pytest.approx(
            [float(wanted[at, token]) for at, token in enumerate(PROMPTS[2][1:])], abs=3e-4
        )
    assert len({tuple(round(score, 3) for score in row) for row in found}) == 4


def test_it_is_of_its_task(folders):
    model = read_own(folders["multi_head_routed"], make_model()).eval()
    runs = shared(folders)
    ids = [runs.put("multi_head_routed", PROMPTS[2], max_tokens=1, task=task) for task in TASKS]
    outputs = runs.outputs()
    for id, task in zip(ids, TASKS, strict=True):
        with torch.no_grad():
            state = task_rows(model, [task], len(PROMPTS[2]))
            wanted = model(torch.tensor([PROMPTS[2]]), state=state).logits_BLV.log_softmax(-1)[0]
        found = [told.logprob for told in outputs[id].prompt_logprobs]
        assert found == pytest.approx([float(wanted[at, token]) for at, token in enumerate(PROMPTS[2][1:])], abs=3e-4)
    assert len({tuple(scores(outputs[id])) for id in ids}) == 3


def test_a_poly_of_pefts_has_numbers_for_tasks(tmp_path):
    base = make_base(tmp_path / "base", "llama")
    make_kind(tmp_path / "poly", "poly", base)
    config = ServingConfig(
        num_blocks=100, block_tokens=4, dtype="float32", adapters=AdaptersConfig(load=(f"p={tmp_path / 'poly'}",))
    )
    runs = Runs(Engine.of(load_model(tmp_path / "base")[0], config))
    prompt, wanted = tuple(range(3, 20)), load_peft(tmp_path / "poly", load_model(tmp_path / "base")[0].eval())
    ids = [runs.put("p", prompt, max_tokens=1, task=str(task)) for task in range(3)]
    outputs = runs.outputs()
    for task, id in enumerate(ids):
        with torch.no_grad():
            logits = wanted(
                torch.tensor([prompt]), state=task_rows(wanted, [str(task)], len(prompt))
            ).logits_BLV.log_softmax(-1)[0]
        found = [told.logprob for told in outputs[id].prompt_logprobs]
        assert found == pytest.approx([float(logits[at, token]) for at, token in enumerate(prompt[1:])], abs=3e-4)
    assert "routes" not in runs.engine.adapters.shelf.facts()[0]
    assert runs.engine.adapters.shelf.facts()[0]["tasks"] == ["0", "1", "2"]


# Rows beside each other

MIXED = [
    {"adapters": None},
    {"adapters": "pool"},
    {"adapters": "pool", "instruction": INSTRUCTIONS["law"]},
    {"adapters": "a"},
    {"adapters": "multi_head_routed", "task": "sql"},
    {"adapters": "multi_head_routed", "task": "law"},
    {"adapters": "routed_low_rank"},
    {"adapters": {"mixed_low_rank": 0.5, "b": -0.5}},
    {"adapters": {"pool": 1.0, "multi_head_routed": 0.25}, "task": "sum", "instruction": INSTRUCTIONS["sql"]},
    {"adapters": "arrow"},
    {"adapters": None},
]
ALL = ("a", "b", "pool", "arrow:pool", "phatgoose:pool", "routed_low_rank", "mixed_low_rank", "multi_head_routed")


def asked(runs, which=None, **more):
    """Outputs of requests as of `MIXED`, asked at once."""
    chosen = range(len(MIXED)) if which is None else which
    ids = []
    for number in chosen:
        fields = dict(MIXED[number])
        ids.append(runs.put(fields.pop("adapters"), PROMPTS[number % len(PROMPTS)], **fields, **more))
    found = runs.outputs()
    return [found[id] for id in ids]


@pytest.mark.parametrize("kind", ["compiled", "modules", "int8"])
def test_a_row_of_a_mixed_batch_is_as_alone(kind, folders):
    runs = shared(folders, kind)
    together = asked(runs, max_tokens=4)
    # Rounded to 8 bits, an input whose last bit differs may be its neighbour: one such step moves a score by some hundredths.
    off = 0.05 if kind == "int8" else 2e-4
    for number, output in enumerate(together):
        [alone] = asked(runs, [number], max_tokens=4)
        assert output.tokens == alone.tokens, MIXED[number]
        assert scores(output) == pytest.approx(scores(alone), abs=off)
        assert output.finish is Finish.LENGTH
    assert len({output.tokens for output in together}) >= len(MIXED) - 2
    assert all(facts["requests"] == 0 for facts in runs.engine.adapters.shelf.facts())


@pytest.mark.parametrize(
    "options",
    [
        {"num_blocks": 40, "max_seqs": 4},
        {"prompt_lookup": 4},
        {"scheduling": "async", "nano_batches": True},
    ],
    ids=["scarce", "drafts", "nano"],
)
def test_however_steps_are_formed(options, folders):
    wanted = asked(shared(folders), max_tokens=12)
    found = asked(engine_of(folders, ALL, **options), max_tokens=12)
    assert [output.tokens for output in found] == [output.tokens for output in wanted]


def test_deterministic_rows_are_to_the_bit_as_alone(folders):
    runs = engine_of(
        folders, ("pool", "multi_head_routed", "routed_low_rank", "mixed_low_rank", "b"), "modules", deterministic=True
    )
    which = [2, 4, 6, 7]
    for number, output in zip(which, asked(runs, which, max_tokens=2), strict=True):
        [alone] = asked(runs, [number], max_tokens=2)
        assert scores(output) == scores(alone), MIXED[number]


def test_the_base_is_to_the_bit_as_if_there_were_none(folders):
    plain = engine_of(folders, ())
    [wanted] = plain([(None, PROMPTS[0])])
    assert scores(asked(shared(folders))[0]) == scores(wanted)


def test_the_prefix_cache_knows_task_query_and_numbers(folders):
    runs = engine_of(folders, ("pool", "arrow:pool", "multi_head_routed"))
    rows = [
        {"adapters": "multi_head_routed", "task": "sql"},
        {"adapters": "multi_head_routed", "task": "law"},
        {"adapters": "pool"},
        {"adapters": "pool", "instruction": INSTRUCTIONS["law"]},
        {"adapters": "pool", "instruction": INSTRUCTIONS["sum"]},
        {"adapters": "arrow"},
    ]

    def once(row):
        fields = dict(row)
        id = runs.put(fields.pop("adapters"), PROMPTS[2], scores=None, **fields)
        return runs.outputs()[id]

    first = [once(row) for row in rows]
    assert [output.cached_tokens for output in first] == [0] * len(rows)
    again = [once(row) for row in rows]
    assert [output.cached_tokens for output in again] == [36] * len(rows)
    assert [output.tokens for output in again] == [output.tokens for output in first]


def test_a_neighbour_whose_numbers_end_harms_itself_alone(folders):
    runs = shared(folders)
    together = [
        runs.put("huge", PROMPTS[0]),
        runs.put({"pool": 1.0, "huge": 1000.0}, PROMPTS[1]),
        runs.put("pool", PROMPTS[2]),
    ]
    found = runs.outputs()
    assert [found[id].finish for id in together[:2]] == [Finish.ERROR] * 2
    [alone] = runs([("pool", PROMPTS[2])])
    assert found[together[2]].tokens == alone.tokens


# Routes


def test_what_routers_choose_is_told(folders):
    runs = shared(folders)
    outputs = asked(runs, record_routing=True)
    pool = GliderPool.load(folders["pool"])
    model = pool.onto(make_model())
    for number in (1, 2):
        fields, output = MIXED[number], outputs[number]
        assert len(output.routing) == 8
        tokens = [*PROMPTS[number % len(PROMPTS)], *output.tokens]
        with torch.no_grad(), record_routing(model) as recorder, pool.answering([fields.get("instruction")]):
            model(torch.tensor([tokens]))
        trace = recorder.trace()
        names = [layer.name.rpartition(".beside.")[0] for layer in trace.layers]
        assert len(output.routing[0]) == len(names) == 14
        for at, route in enumerate(output.routing):
            position = len(PROMPTS[number % len(PROMPTS)]) - 1 + at
            for layer, matrix in zip(trace.layers, route, strict=True):
                decisions = trace.decisions(layer.layer)
                [index_K] = decisions.index_NK[decisions.position_N == position]
                assert set(route[matrix]) == {pool.names[index] for index in index_K if index >= 0}
    # What goes by task has no routers, and the base none at all.
    assert not any(outputs[0].routing)
    assert not any(outputs[4].routing)
    # One router of three matrices decides once.
    assert set(outputs[7].routing[0]) == {
        f"blocks.{layer}.{part}" for layer in (0, 1) for part in ("attention.q", "feed_forward.down")
    }
    assert {name for route in outputs[7].routing for chosen in route.values() for name in chosen} <= {"0", "1", "2"}
    # And it changes nothing.
    assert [output.tokens for output in outputs] == [output.tokens for output in asked(runs)]


@pytest.mark.filterwarnings("ignore:record_routing heard none")
@pytest.mark.parametrize("name", ROUTERS)
def test_whoever_listens_to_routers_is_known_until_he_goes(name, folders):
    """For then passes are run whole, which takes longer."""
    model = make_model()
    layers = AdapterReader(model.config, Sites(model))(str(folders[name]))
    assert not layers.is_watched
    with record_routing(model, routers=layers.routers):
        assert layers.is_watched
    assert not layers.is_watched


@pytest.mark.parametrize("options", [{}, {"num_blocks": 30, "max_seqs": 3}], ids=["plenty", "scarce"])
def test_they_are_recorded_around_an_engine(options, folders):
    """A trace of a router's decisions, of the rows that asked for it alone; each position once, though requests are computed again."""
    runs = engine_of(folders, ("pool", "a"), **options)
    routers = runs.engine.adapters.routers("pool")
    rows = [("pool", PROMPTS[0]), ("a", PROMPTS[1]), ("pool", PROMPTS[3]), (None, PROMPTS[2])]
    with record_routing(runs.engine.runner.model, routers=routers) as recorder:
        outputs = runs(rows, max_tokens=20)
    trace = recorder.trace()
    assert [layer.name for layer in trace.layers] == list(routers)
    decisions = trace.decisions(trace.layers[0].layer)
    lengths = sorted(
        len(prompt) + len(output.tokens) - 1
        for (name, prompt), output in zip(rows, outputs, strict=True)
        if name == "pool"
    )
    counts = torch.tensor(decisions.item_N).unique(return_counts=True)[1].tolist()
    assert sorted(counts) == lengths
    pairs = list(zip(decisions.item_N.tolist(), decisions.position_N.tolist(), strict=True))
    assert len(set(pairs)) == len(pairs)
    with pytest.raises(InputError, match="'a' is not in memory, or has no routers"):
        runs.engine.adapters.routers("a")


# What a request may say


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        (
            {"adapters": "multi_head_routed"},
            "adapter 'multi_head_routed' goes by task, and the request names none; say task, one of 'sql', 'law'",
        ),
        ({"adapters": "multi_head_routed", "task": "sqll"}, "task 'sqll' is not one of the 3 .* did you mean 'sql'"),
        ({"adapters": "multi_head_routed", "task": ""}, "task '' is not one of the 3"),
        ({"adapters": "pool", "task": "sql"}, "task is 'sql', and nothing in what it adds goes by tasks"),
        ({"adapters": None, "task": "sql"}, "task is 'sql', and nothing in the model goes by tasks"),
        ({"adapters": "a", "task": "sql"}, "nothing in what it adds goes by tasks"),
        ({"adapters": None, "task": 7}, "task is 7; it must be text, or None"),
        ({"adapters": "pool", "instruction": 7}, "instruction is 7; it must be text, or None"),
    ],
)
def test_what_cannot_be_said(fields, what, folders):
    runs = shared(folders)
    fields = dict(fields)
    id = runs.put(fields.pop("adapters"), PROMPTS[0], **fields)
    beside = runs.put("pool", PROMPTS[1])
    found = runs.outputs()
    assert isinstance(found[id], Refused)
    with pytest.raises(InputError, match=what):
        raise found[id].reason
    assert len(found[beside].tokens) == 8
    assert all(facts["requests"] == 0 for facts in runs.engine.adapters.shelf.facts())


def test_a_refusal_names_the_field(folders):
    runs = shared(folders)
    id = runs.put("multi_head_routed", PROMPTS[0], task="none")
    assert runs.outputs()[id].reason.field == "task"


# A model that goes by tasks itself


def test_a_model_that_was_adapted_goes_by_task():
    model = with_layers("multi_head_routed")
    config = ServingConfig(**SMALL)
    runs = Runs(Engine.of(copy.deepcopy(model), config))
    runs.engine.warm_up()
    assert runs.engine.info.tasks == TASKS
    ids = {task: runs.put(None, PROMPTS[2], task=task) for task in TASKS}
    untold, wrong = runs.put(None, PROMPTS[2]), runs.put(None, PROMPTS[2], task="x")
    found = runs.outputs()
    assert "the model goes by task, and the request names none" in found[untold].error
    assert "task 'x' is not one of the 3" in found[wrong].error
    for task, id in ids.items():
        alone = Runs(Engine.of(copy.deepcopy(model), config))
        own = alone.put(None, PROMPTS[2], task=task)
        output = alone.outputs()[own]
        assert found[id].tokens == output.tokens
        with torch.no_grad():
            state = task_rows(model, [task], len(PROMPTS[2]))
            wanted = model(torch.tensor([PROMPTS[2]]), state=state).logits_BLV.log_softmax(-1)[0]
        scored = [told.logprob for told in found[id].prompt_logprobs]
        assert scored == pytest.approx([float(wanted[at, token]) for at, token in enumerate(PROMPTS[2][1:])], abs=3e-4)
    assert len({found[id].tokens for id in ids.values()}) > 1
    # Keys and values are those of a task.
    again = runs.put(None, PROMPTS[2], task="law", scores=None)
    assert runs.outputs()[again].tokens == found[ids["law"]].tokens


def test_a_model_may_do_without_a_task():
    model = make_model()
    layers = {name: layer.replace(unknown="average") for name, layer in LAYERS_OF["multi_head_routed"]().items()}
    runs = Runs(Engine.of(put_on(model, layers, seed=1).eval(), ServingConfig(**SMALL)))
    [output] = runs([(None, PROMPTS[0])])
    assert len(output.tokens) == 8


def test_in_python(folders):
    load = (f"mhr={folders['multi_head_routed']}", f"pool=arrow:{folders['pool']}")
    llm = LLM(make_model(), **SMALL, adapters=AdaptersConfig(load=load))
    greedy = Sampling(temperature=0, max_tokens=6, ignore_eos=True)
    tokens = {task: llm.generate([PROMPTS[0]], greedy, adapters="mhr", task=task)[0].tokens for task in TASKS}
    assert len(set(tokens.values())) > 1
    with pytest.raises(InputError, match="goes by task"):
        llm.generate([PROMPTS[0]], greedy, adapters="mhr")
    answer = llm.generate([PROMPTS[0]], greedy, adapters="pool", record_routing=True)[0]
    assert set(answer.output.routing[0]["blocks.0.attention.q"]) <= set(TASKS)
    llm.close()


# Memory


def test_what_they_take_is_told_and_given_back(folders):
    runs = engine_of(folders, ())
    shelf = runs.engine.adapters.shelf
    for name in ("pool", "multi_head_routed"):
        shelf.load_now(name, folders[name])
        held = shelf.peek(name)
        modules = [*held.parts.values(), *(layer.table for layer in held.parts.values() if hasattr(layer, "table"))]
        own = {tensor.data_ptr(): tensor.nbytes for module in modules for tensor in module.state_dict().values()}
        assert held.nbytes == sum(own.values())
        layers, asked = weakref.ref(next(iter(held.parts.values()))), held.asked
        if asked is not None:
            assert asked.pool._model is None
        del held, own, modules, asked
        gc.disable()
        try:
            shelf.remove(name)
            assert layers() is None
        finally:
            gc.enable()


def test_the_frame_takes_no_memory_of_the_model(folders, monkeypatch):
    frames, build = [], layer_reader.build_empty
    monkeypatch.setattr(layer_reader, "build_empty", lambda config: frames.append(build(config)) or frames[-1])
    runs = engine_of(folders, ("pool", "routed_low_rank"))
    model = runs.engine.runner.model
    assert len(frames) == 2
    for frame in frames:
        assert frame.embedding.weight.data_ptr() == model.embedding.weight.data_ptr()
        assert all(parameter.is_meta for name, parameter in frame.named_parameters() if ".matrix." in name)


def test_a_pool_that_does_not_fit_is_refused_by_its_headers(folders):
    config = ServingConfig(**SMALL, adapters=AdaptersConfig(load=(f"pool={folders['pool']}",), memory="1KiB"))
    with pytest.raises(CapacityError, match=r"engine\.adapters\.memory"):
        Engine.of(copy.deepcopy(model_of("compiled")), config)


# What is refused


def test_folders_that_cannot_be_served(folders, tmp_path):
    shelf = engine_of(folders, ()).engine.adapters.shelf
    (tmp_path / "empty").mkdir()
    other = with_layers("routed_low_rank", make_model(init_std=0.1))
    write_own(tmp_path / "other", other)
    for id in ("lst", "mam"):
        around = copy.deepcopy(model_of("compiled"))
        catalogue.apply(around, id)
        write_own(tmp_path / id, around)
    damaged = tmp_path / "damaged"
    make_pool(damaged)
    (damaged / "sql" / "adapter_model.safetensors").write_bytes(b"x" * 20)
    for folder, error, what in (
        (str(tmp_path / "empty"), CheckpointError, "holds no adapter_config.json"),
        (f"arrow:{tmp_path / 'empty'}", CheckpointError, "nothing that arrow could choose from"),
        (f"arrow:{folders['a']}", ConfigError, "is one adapter, and arrow routes among several"),
        (str(tmp_path / "other"), CheckpointError, "was trained on another base"),
        (str(damaged), CheckpointError, "sql"),
        (
            str(tmp_path / "lst"),
            ConfigError,
            "a ladder along it, which no request can have for itself; .* adapters fuse",
        ),
        (str(tmp_path / "mam"), ConfigError, "has virtual tokens in front of the model"),
    ):
        with pytest.raises(error, match=what):
            shelf.load_now("x", folder)
    assert shelf.names == ()


def test_a_pool_that_adapts_the_head_is_refused(tmp_path):
    for name in "ab":
        make_adapter(tmp_path / "pool" / name, {**layers_of(("self_attn.q_proj",)), "lm_head": (DIM, VOCAB)}, seed=name)
    with pytest.raises(ConfigError, match="adapts head, which is computed behind the pass"):
        engine_of({"pool": str(tmp_path / "pool")}, ("pool",))


# In any company

ROW = st.tuples(
    st.sampled_from([None, "a", "pool", "arrow", "mixed_low_rank", "routed_low_rank"]).flatmap(
        lambda name: st.tuples(st.just(name), st.sampled_from([None, *INSTRUCTIONS.values()]), st.none())
    )
    | st.tuples(st.just("multi_head_routed"), st.none(), st.sampled_from(TASKS)),
    st.sampled_from(PROMPTS),
)


@functools.cache
def _alone(key, row):
    (adapters, instruction, task), prompt = row
    runs = _shared[key]
    id = runs.put(adapters, prompt, instruction=instruction, task=task, max_tokens=4)
    return runs.outputs()[id].tokens


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(ROW, min_size=2, max_size=6))
def test_whoever_is_beside_it_a_row_is_as_alone(rows, folders):
    runs = shared(folders)
    ids = [
        runs.put(adapters, prompt, instruction=query, task=task, max_tokens=4)
        for (adapters, query, task), prompt in rows
    ]
    found = runs.outputs()
    assert [found[id].tokens for id in ids] == [_alone(("compiled",), row) for row in rows]


# Memory


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """A pool of one adapter of rank 32 and seven of rank 1, on other matrices than each other, with gates."""
    root = tmp_path_factory.mktemp("uneven")
    for number, rank in enumerate((32, *(1,) * 7)):
        layers = layers_of() if number % 2 == 0 else layers_of(("self_attn.q_proj", "mlp.down_proj"))
        make_adapter(root / f"e{number}", layers, seed=str(number), rank=rank)
        gates = {
            module: torch.randn(inputs, generator=torch.Generator().manual_seed(number))
            for module, (inputs, _) in layers.items()
        }
        describe_expert(root / f"e{number}", instruction=f"Do what number {number} is for.", gate=gates)
    return root


def reader_of(model):
    return AdapterReader(model.config, Sites(model))


@pytest.mark.parametrize("kind", ["", "phatgoose:", "arrow:", *LAYERS_OF])
def test_what_layers_take_is_known_before_they_are_read(kind, uneven, folders):
    """In a pool's stacks all adapters have the greatest rank: the headers' sizes were told, a thirteenth of it."""
    place = folders[kind] if kind in LAYERS_OF else f"{kind}{uneven}"
    told = []
    held = reader_of(make_model())(place, None, told.append)
    assert told == [held.nbytes]


def test_a_pool_that_has_no_room_is_refused_before_its_numbers_are_read(uneven, monkeypatch):
    taken = size_of(folder_of(str(uneven), None))
    assert taken > 4 * sum(size_of(folder_of(str(place), None)) for place in uneven.iterdir())
    config = ServingConfig(**SMALL, adapters=AdaptersConfig(load=(f"pool={uneven}",), memory=f"{taken}B"))
    Engine.of(make_model(), config)
    monkeypatch.setattr(GliderPool, "add", None)
    less = config.replace(adapters=config.adapters.replace(memory=f"{taken - 1}B"))
    with pytest.raises(CapacityError, match=rf"takes {taken:,} bytes, and adapters may take {taken - 1:,}"):
        Engine.of(make_model(), less)


def test_gates_are_kept_once(uneven, monkeypatch):
    """The pool had its own beside those in the layers, which nobody counted."""
    read, kept = glider_pool.read_described, []

    def watched(folder):
        found = read(folder)
        kept.extend(map(weakref.ref, (found.gates or {}).values()))
        return found

    monkeypatch.setattr(glider_pool, "read_described", watched)
    held = reader_of(make_model())(str(uneven))
    gc.collect()
    assert len(kept) >= 8
    assert not any(gate() is not None for gate in kept)
    assert held.terms("number 3").bias is not None
    # Nor are all queries kept that ever came.
    for number in range(200):
        held.terms(f"query {number}")
    assert len(held.asked.pool.matcher._seen) == layer_reader.QUERIES
