"""Adapters in an engine: each request its own, exactly as alone, whoever is beside; and as the model that has the adapter put on."""

import copy
import functools
import gc
import threading
from concurrent.futures import Future

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapter_models import drawn, make_adapter
from anabranch.adapters import load_peft, load_pool, rows_for
from anabranch.adapters.peft_file import AdapterFile
from anabranch.errors import CapacityError, CheckpointError, ConfigError
from anabranch.nn.quantize import quantize
from anabranch.serving import LLM, Sampling
from anabranch.serving.adapters import AdaptersConfig
from anabranch.serving.config import ServingConfig
from anabranch.serving.core.request import Finish
from anabranch.serving.engine import ModelRunner
from anabranch.serving.engine.engine import Engine
from anabranch.serving.engine.loop import _reply
from anabranch.serving.engine.messages import Control, Refused, Reply
from served_adapters import ATTENTION, DIM, LAYERS, VOCAB, Runs, layers_of, make_adapters, make_model, scores
from waiting import until

PROMPTS = [
    tuple((7 * at + 31 * number) % VOCAB for at in range(length))
    for number, length in enumerate((21, 5, 40, 33, 2, 18, 9))
]
ASKED = [None, "a", "b", (("a", 0.5), ("b", 0.5)), {"a": 0.7, "c": -0.3}, "c", None]
SMALL = {"num_blocks": 200, "block_tokens": 4, "max_batched_tokens": 24, "long_prefill_chunk": 9, "dtype": "float32"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_adapters(tmp_path_factory.mktemp("adapters"))


@functools.cache
def model_of(kind):
    model = make_model(is_moe=kind == "moe", tie_embeddings=kind == "tied")
    if kind == "int8":
        quantize(model, "int8")
    return model


def engine_of(kind, folders, names=("a", "b", "c"), *, engine=None, **options):
    config = ServingConfig(
        **{**SMALL, **options}, adapters=AdaptersConfig(load=tuple(f"{name}={folders[name]}" for name in names))
    )
    more = {} if kind != "modules" else {"make_runner": functools.partial(ModelRunner, use_kernel=False)}
    return Runs(Engine.of(copy.deepcopy(model_of(kind)), config, **more, **(engine or {})))


def parts_of(kind, folders, tmp_path):
    """Adapters that a kind of model has places for."""
    if kind != "moe":
        return folders
    made = {}
    for name, words in (("a", ATTENTION[:2]), ("b", ATTENTION), ("c", ATTENTION[2:])):
        make_adapter(tmp_path / name, layers_of(words), seed=name, rank=3)
        made[name] = str(tmp_path / name)
    return made


@pytest.mark.parametrize("kind", ["compiled", "modules", "int8", "moe", "tied"])
def test_a_row_of_a_mixed_batch_is_as_alone(kind, folders, tmp_path):
    folders = parts_of(kind, folders, tmp_path)
    runs = engine_of(kind, folders)
    assert (runs.engine.runner.fast is None) == (kind == "modules")
    together = runs(zip(ASKED, PROMPTS, strict=True))
    assert len({output.tokens for output in together}) == len(together)
    one_by_one = engine_of(kind, folders, prefix_cache=False)
    for adapters, prompt, output in zip(ASKED, PROMPTS, together, strict=True):
        [alone] = one_by_one([(adapters, prompt)])
        assert output.tokens == alone.tokens
        assert scores(output) == pytest.approx(scores(alone), abs=1e-5)
        assert output.finish is Finish.LENGTH
    assert all(facts["requests"] == 0 for facts in runs.engine.adapters.shelf.facts())


@pytest.mark.parametrize("kind", ["compiled", "modules"])
def test_it_is_the_model_with_the_adapter_put_on(kind, folders):
    runs = engine_of(kind, folders, ("a", "b", "c", "head"))
    for name in ("a", "b", "c", "head"):
        model = load_peft(folders[name], copy.deepcopy(model_of(kind)))
        wanted = model(torch.tensor([PROMPTS[2]])).logits_BLV.log_softmax(-1)[0]
        [output] = runs([(name, PROMPTS[2])], max_tokens=1)
        found = [told.logprob for told in output.prompt_logprobs]
        assert found == pytest.approx([float(wanted[at, token]) for at, token in enumerate(PROMPTS[2][1:])], abs=5e-5)
        assert output.tokens == (int(wanted[-1].argmax()),)
    pool = load_pool({name: folders[name] for name in "abc"}, copy.deepcopy(model_of(kind)))
    row = {"a": 0.7, "c": -0.3}
    wanted = pool(torch.tensor([PROMPTS[3]]), state=rows_for(pool, [row], len(PROMPTS[3]))).logits_BLV.log_softmax(-1)[
        0
    ]
    [output] = runs([(row, PROMPTS[3])], max_tokens=1)
    found = [told.logprob for told in output.prompt_logprobs]
    assert found == pytest.approx([float(wanted[at, token]) for at, token in enumerate(PROMPTS[3][1:])], abs=5e-5)


@pytest.mark.parametrize("kind", ["compiled", "modules"])
def test_of_a_model_in_bfloat16_they_are_kept_so(kind, folders):
    """Half the memory, and what peft computes to the rounding; each row as alone."""
    more = {} if kind == "compiled" else {"make_runner": functools.partial(ModelRunner, use_kernel=False)}
    load = tuple(f"{name}={folders[name]}" for name in "ab")
    model = copy.deepcopy(model_of("compiled")).bfloat16()
    config = ServingConfig(**{**SMALL, "dtype": "bfloat16"}, adapters=AdaptersConfig(load=load))
    runs = Runs(Engine.of(copy.deepcopy(model), config, **more))
    wide = {facts["name"]: facts["bytes"] for facts in engine_of("compiled", folders).engine.adapters.shelf.facts()}
    for facts in runs.engine.adapters.shelf.facts():
        assert facts["bytes"] == wide[facts["name"]] // 2
    together = runs(zip(("a", "b", None), PROMPTS, strict=False))
    for name, prompt, output in zip(("a", "b", None), PROMPTS, together, strict=False):
        one = copy.deepcopy(model)
        one = one if name is None else load_peft(folders[name], one)
        wanted = one(torch.tensor([prompt])).logits_BLV.float().log_softmax(-1)[0]
        found = [told.logprob for told in output.prompt_logprobs]
        assert found == pytest.approx([float(wanted[at, token]) for at, token in enumerate(prompt[1:])], abs=0.5)
        [alone] = runs([(name, prompt)])
        assert alone.tokens == output.tokens


@pytest.mark.parametrize("kind", ["compiled", "modules"])
def test_the_base_is_to_the_bit_as_if_there_were_no_adapters(kind, folders):
    plain, with_some = engine_of(kind, folders, ()), engine_of(kind, folders)
    asked = [(None, prompt) for prompt in PROMPTS]
    wanted = plain(asked)
    assert [scores(output) for output in with_some(asked)] == [scores(output) for output in wanted]
    # Nor do those beside change what the base's rows are.
    [alone] = plain([(None, PROMPTS[1])])
    beside = with_some([(None, PROMPTS[1]), ("a", PROMPTS[2]), ("b", PROMPTS[3])])
    assert scores(beside[0]) == scores(alone)


def test_the_compiled_step_runs_all_rows_but_those_that_it_cannot_add_to(tmp_path, folders, monkeypatch):
    ran = []
    runs = engine_of("compiled", folders)
    hidden = runs.engine.runner.model.hidden
    monkeypatch.setattr(
        runs.engine.runner.model, "hidden", lambda *args, **more: ran.append(1) or hidden(*args, **more)
    )
    wanted = runs(zip(ASKED, PROMPTS, strict=True))
    assert not ran
    # Of whoever listens inside the model, each row is seen, and is what it is.
    handle = runs.engine.runner.model.blocks[0].attention.register_forward_hook(lambda *_: ran.append(2))
    found = runs(zip(ASKED, PROMPTS, strict=True))
    handle.remove()
    assert set(ran) == {1, 2}
    for one, other in zip(found, wanted, strict=True):
        assert one.tokens == other.tokens
        assert scores(one) == pytest.approx(scores(other), abs=1e-4)


def test_the_model_itself_is_left_as_it_is(folders):
    runs = engine_of("modules", folders)
    names = [name for name, _ in runs.engine.runner.model.named_modules()]
    runs([("a", PROMPTS[0])])
    assert [name for name, _ in runs.engine.runner.model.named_modules()] == names
    assert runs.engine.runner.model.config.linears == {}


@pytest.mark.parametrize("kind", ["compiled", "modules"])
def test_a_hostile_neighbour_harms_itself_alone(kind, folders):
    runs = engine_of(kind, folders, ("a", "b", "huge"))
    asked = [
        (None, PROMPTS[0]),
        ("huge", PROMPTS[1]),
        ("a", PROMPTS[2]),
        ({"a": 1.0, "huge": 1000.0}, PROMPTS[3]),
        ("b", PROMPTS[5]),
    ]
    outputs = runs(asked)
    for number in (1, 3):
        assert outputs[number].finish is Finish.ERROR
        assert not outputs[number].engine_failed
    one_by_one = engine_of(kind, folders, ("a", "b"), prefix_cache=False)
    for number in (0, 2, 4):
        [alone] = one_by_one([asked[number]])
        assert outputs[number].tokens == alone.tokens
        assert scores(outputs[number]) == pytest.approx(scores(alone), abs=1e-5)
    # What it left in the cache is nobody's.
    assert runs([(None, PROMPTS[1])])[0].tokens == engine_of(kind, folders, ())([(None, PROMPTS[1])])[0].tokens


def test_deterministic_rows_are_to_the_bit_as_alone(folders):
    runs = engine_of("modules", folders, deterministic=True)
    asked = list(zip(ASKED, PROMPTS, strict=True))[:4]
    for one, output in zip(asked, runs(asked, max_tokens=3), strict=True):
        [alone] = runs([one], max_tokens=3)
        assert scores(output) == scores(alone)


@pytest.mark.parametrize(
    "options",
    [
        {"num_blocks": 30, "max_seqs": 4},
        {"prompt_lookup": 4},
        {"scheduling": "async"},
        {"scheduling": "async", "nano_batches": True},
        {"host_kv": "1MiB", "num_blocks": 30},
    ],
    ids=["scarce", "drafts", "async", "nano", "host"],
)
def test_however_steps_are_formed(options, folders):
    asked = list(zip(ASKED, [*PROMPTS[:2], (9, 8, 7) * 8, *PROMPTS[3:]], strict=True))
    wanted = engine_of("compiled", folders)(asked, max_tokens=24)
    found = engine_of("compiled", folders, **options)(asked, max_tokens=24)
    assert [output.tokens for output in found] == [output.tokens for output in wanted]


def test_the_prefix_cache_knows_numbers_not_names(folders, tmp_path):
    runs = engine_of("compiled", folders)
    shelf, prompt = runs.engine.adapters.shelf, PROMPTS[2]
    more = {"scores": None}
    first = {str(adapters): runs([(adapters, prompt)], **more)[0] for adapters in ASKED}
    assert first["None"].cached_tokens > 0  # the second of two bases
    assert [first[str(adapters)].cached_tokens for adapters in ASKED[1:-1]] == [0] * 5
    for adapters in ASKED:
        again = runs([(adapters, prompt)], **more)[0]
        assert again.cached_tokens == 36
        assert again.tokens == first[str(adapters)].tokens
    # Another order, and another name of the same numbers.
    assert runs([({"c": -0.3, "a": 0.7}, prompt)], **more)[0].cached_tokens == 36
    assert runs([({"c": -0.3, "a": 0.71}, prompt)], **more)[0].cached_tokens == 0
    shelf.load_now("also", folders["a"])
    assert runs([("also", prompt)], **more)[0].cached_tokens == 36
    # Others under the same name; then those of before again.
    shelf.load_now("also", folders["b"])
    output = runs([("also", prompt)], **more)[0]
    assert output.tokens == first["b"].tokens
    make_adapter(tmp_path / "other", layers_of(), seed="other", rank=6)
    shelf.load_now("also", str(tmp_path / "other"))
    output = runs([("also", prompt)], **more)[0]
    assert output.cached_tokens == 0
    assert output.tokens != first["b"].tokens
    # A weight of zero is the base.
    assert runs([({"a": 0.0}, prompt)], **more)[0].cached_tokens == 36


def test_a_request_ends_with_the_adapter_that_it_began_with(folders):
    runs = engine_of("compiled", folders, ())
    shelf = runs.engine.adapters.shelf
    shelf.load_now("x", folders["a"])
    [alone] = runs([("x", PROMPTS[0])], max_tokens=20)
    id = runs.put("x", PROMPTS[0], max_tokens=20)
    for _ in range(5):
        runs.loop._turn()
    runs.loop.put(Control(1, "remove_adapter", {"adapter": "x"}))
    other = runs.put("x", PROMPTS[0])
    found = runs.outputs()
    assert found[id].tokens == alone.tokens
    assert isinstance(found[other], Refused)
    assert "no adapter 'x'" in found[other].error
    assert shelf.stats().gauges["adapter_resident_bytes"] == 0


def test_a_load_holds_no_step_up(folders):
    runs = engine_of("compiled", folders, ())
    shelf, gate, read = runs.engine.adapters.shelf, threading.Event(), runs.engine.adapters.shelf._source.read

    def slow(*where):
        assert gate.wait(60)
        return read(*where)

    shelf._source.read = slow
    runs.loop.put(Control(1, "load_adapter", {"adapter": "x", "folder": folders["a"]}))
    runs.loop.put(Control(2, "load_adapter", {"adapter": "y", "folder": "nowhere"}))
    assert len(runs([(None, PROMPTS[0])])[0].tokens) == 8
    gate.set()
    replies = {}
    while len(replies) < 2:
        runs.loop._turn()
        replies |= {event.number: event for event in runs.events if isinstance(event, Reply)}
        runs.events.clear()
    assert replies[1].value["in_memory"]
    assert isinstance(replies[2].error, CheckpointError)
    assert runs([("x", PROMPTS[0])])[0].tokens == engine_of("compiled", folders)([("a", PROMPTS[0])])[0].tokens


def test_adapters_come_from_their_folders_as_they_are_asked_for(folders):
    size = engine_of("compiled", folders, ("c",)).engine.adapters.shelf.facts()[0]["bytes"]
    runs = Runs(
        Engine.of(
            copy.deepcopy(model_of("compiled")), ServingConfig(**SMALL, adapters=AdaptersConfig(memory=f"{size}B"))
        )
    )
    shelf = runs.engine.adapters.shelf
    assert size >= shelf.most_bytes
    shelf.register("c", folders["c"])
    shelf.register("d", folders["c"])
    shelf.register("b", folders["b"])
    wanted = engine_of("compiled", folders)([("c", PROMPTS[0])])[0].tokens
    for name in ("c", "d", "c"):
        assert runs([(name, PROMPTS[0])])[0].tokens == wanted
    assert shelf.stats().counters == {"adapter_loads": 3, "adapter_evictions": 2}
    # Two at a time have no room; the one that comes later waits until the first has ended.
    outputs = runs([("c", PROMPTS[0]), ("d", PROMPTS[1]), ("b", PROMPTS[2]), ("none", PROMPTS[2])])
    assert outputs[0].tokens == wanted
    assert outputs[1].tokens == runs([("d", PROMPTS[1])])[0].tokens
    assert not getattr(outputs[2], "is_busy", False)
    assert not getattr(outputs[3], "is_busy", False)
    assert runs([("d", PROMPTS[0])])[0].tokens == wanted


def test_texts_as_vectors(folders):
    runs = engine_of("compiled", folders)
    sampling = {"max_tokens": 0, "scores": None}
    for pooling in ("last", "mean"):
        base, a, b = runs([(name, PROMPTS[0]) for name in (None, "a", "b")], pooling=pooling, **sampling)
        [alone] = engine_of("compiled", folders)([("a", PROMPTS[0])], pooling=pooling, **sampling)
        assert a.embedding == pytest.approx(alone.embedding, abs=1e-5)
        assert len({base.embedding, a.embedding, b.embedding}) == 3


def test_in_python(folders):
    llm = LLM(copy.deepcopy(model_of("compiled")), **SMALL, adapters=AdaptersConfig(load=(f"a={folders['a']}",)))
    greedy = Sampling(temperature=0, max_tokens=6, ignore_eos=True)
    tokens = {
        str(adapters): llm.generate([PROMPTS[0]], greedy, adapters=adapters)[0].tokens
        for adapters in (None, "a", {"a": 0.5})
    }
    assert len(set(tokens.values())) == 3
    assert llm.engine.info.adapters == ("a",)
    llm.close()


@pytest.mark.parametrize(
    ("make", "error", "what"),
    [
        (lambda folder: None, CheckpointError, "no adapter at"),
        (
            lambda folder: make_adapter(folder, {"model.layers.0.self_attn.q_proj": (DIM, DIM + 1)}),
            CheckpointError,
            "inputs",
        ),
        (
            lambda folder: make_adapter(folder, layers_of(), extra={"lm_head.weight": drawn("h", (VOCAB, DIM))}),
            ConfigError,
            "whole",
        ),
    ],
    ids=["none", "widths", "whole"],
)
def test_what_cannot_be_served_is_refused_when_the_engine_starts(make, error, what, tmp_path):
    make(tmp_path / "x")
    with pytest.raises(error, match=what):
        engine_of("compiled", {"x": str(tmp_path / "x")}, ("x",))


def test_adapters_that_never_fit(folders):
    config = ServingConfig(**SMALL, adapters=AdaptersConfig(load=(f"a={folders['a']}",), memory="1KiB"))
    with pytest.raises(CapacityError, match=r"engine\.adapters\.memory"):
        Engine.of(copy.deepcopy(model_of("compiled")), config)


def _big_tensors(least=5000):
    return sum(type(thing) is torch.Tensor and thing.numel() >= least for thing in gc.get_objects())


def _reply_of(runs, folder, root=None):
    runs.loop.put(Control(7, "load_adapter", {"adapter": "x", "folder": str(folder), "root": root}))
    while not (replies := [event for event in runs.events if isinstance(event, Reply)]):
        runs.loop._turn()
    runs.events.clear()
    return replies[0]


@pytest.mark.parametrize("case", ["too large", "half as large as it says", "not a number"])
def test_a_refused_load_keeps_nothing_in_memory(case, tmp_path):
    layers = {f"model.layers.{layer}.self_attn.q_proj": (DIM, DIM) for layer in range(LAYERS)}
    make_adapter(tmp_path / "x", layers, rank=128)  # 4 tensors of 8192 numbers, 131 KB
    file = tmp_path / "x" / "adapter_model.safetensors"
    tensors, memory = load_file(file), "50KB"
    if case == "half as large as it says":
        # A pickled file tells its size once it is read.
        torch.save({name: tensor.half() for name, tensor in tensors.items()}, tmp_path / "x" / "adapter_model.bin")
        file.unlink()
        memory = "100KB"
    elif case == "not a number":
        list(tensors.values())[-1][0, 0] = torch.nan
        save_file(tensors, file)
        memory = "1MiB"
    del tensors
    runs = Runs(
        Engine.of(copy.deepcopy(model_of("compiled")), ServingConfig(**SMALL, adapters=AdaptersConfig(memory=memory)))
    )
    gc.collect()
    before = _big_tensors()
    gc.disable()
    try:
        replies = [_reply_of(runs, tmp_path / "x") for _ in range(3)]
        # The worker's thread may still be on its way out of the last one.
        until(lambda: _big_tensors() <= before)
    finally:
        gc.enable()
    wanted = CheckpointError if case == "not a number" else CapacityError
    assert all(isinstance(reply.error, wanted) for reply in replies)


def test_a_load_that_is_called_off_is_answered():
    future = Future()
    future.cancel()
    assert str(_reply(3, future).error) == "the engine ends"


def test_sizes_are_compared_before_a_number_is_read(tmp_path, monkeypatch):
    make_adapter(tmp_path / "x", layers_of(), rank=8)
    read = []
    monkeypatch.setattr(AdapterFile, "read", lambda self, name: read.append(name))
    runs = Runs(
        Engine.of(copy.deepcopy(model_of("compiled")), ServingConfig(**SMALL, adapters=AdaptersConfig(memory="1KiB")))
    )
    reply = _reply_of(runs, tmp_path / "x")
    size = sum(tensor.numel() * 4 for tensor in load_file(tmp_path / "x" / "adapter_model.safetensors").values())
    assert f"takes {size:,} bytes" in str(reply.error)
    assert read == []


def test_what_is_read_in_one_piece_has_a_bound(tmp_path):
    runs = engine_of("compiled", {}, ())
    make_adapter(tmp_path / "config", layers_of(), rank=2, foo=["x" * 100] * 2_700)
    make_adapter(tmp_path / "header", layers_of(), rank=2)
    file = tmp_path / "header" / "adapter_model.safetensors"
    save_file(load_file(file), file, metadata={"text": "x" * (1 << 20)})
    for name, what in (("config", "it has 2"), ("header", "its header of tensors has 1,")):
        reply = _reply_of(runs, tmp_path / name)
        assert isinstance(reply.error, CheckpointError)
        assert what in str(reply.error)


@pytest.mark.parametrize("damage", [b"", b"\x01", b"\xff" * 8, b"\xff" * 64, b"\x02" + bytes(7) + b"[]", bytes(8)])
def test_headers_that_are_none(damage, tmp_path):
    runs = engine_of("compiled", {}, ())
    make_adapter(tmp_path / "x", layers_of(), rank=2)
    (tmp_path / "x" / "adapter_model.safetensors").write_bytes(damage)
    assert isinstance(_reply_of(runs, tmp_path / "x").error, CheckpointError)
