"""Nano-batched execution gives what the whole batch gives, whatever the cuts, the executor and the design."""

import threading

import pytest
import torch

from anabranch import presets
from anabranch.errors import BackendError, InputError
from anabranch.lm import Decoder
from anabranch.nn import MoE, SwiGLU
from anabranch.nn.attention import SelfAttention
from anabranch.serving.core.batch import Batch, Chunk
from anabranch.serving.core.request import Request
from anabranch.serving.engine.runner import ModelRunner
from anabranch.serving.engine.verify import sampled_rows
from anabranch.serving.nanoflow.execute import Sequential, Streams, Threads
from anabranch.serving.nanoflow.runtime import NanoRunner, default_executor
from anabranch.serving.planning.cost import Workload
from anabranch.serving.planning.graph import LayerGraph, Operation
from anabranch.serving.planning.hardware import find_hardware
from anabranch.serving.planning.order import list_order
from anabranch.serving.planning.search import search
from anabranch.serving.planning.shape import find_shape
from anabranch.serving.planning.simulate import Schedule

VOCAB, BLOCKS = 97, 64
CLOSE = 1e-5  # float32: a product of fewer rows may add in another order
THREADS = Threads({"compute": 1, "memory": 1})


def decoder(feed_forward=None, **attention):
    attention = {"num_heads": 4, "num_kv_heads": 2, "qk_norm": "head", "qkv_bias": True} | attention
    return Decoder.Config(
        vocab_size=VOCAB,
        dim=32,
        num_layers=3,
        attention=SelfAttention.Config(**attention),
        feed_forward=feed_forward or SwiGLU.Config(hidden_dim=48),
        max_positions=256,
    ).build(seed=1)


def chunks(lengths, start=0, blocks=4):
    """Requests of these many tokens; blocks of their own."""
    made = []
    for number, length in enumerate(lengths):
        tokens = tuple((7 * number + 3 * at + start) % VOCAB for at in range(length))
        table = tuple(range(blocks * number, blocks * number + blocks))
        made.append(Chunk(id=str(number), tokens=tokens, start=start, blocks=table, samples=number != 1))
    return made


def logits_of(runner, steps):
    """Logits of each step, run in order on one pool."""
    with torch.inference_mode():
        return [
            runner._head.plain(
                runner._hidden(step, [token for chunk in step for token in chunk.tokens], sampled_rows(step))
            )
            for step in steps
        ]


def steps():
    """A step of prompts, then one that mixes decodes and prompts in any order, then decodes alone."""
    first = chunks([5, 20, 1, 9])
    lengths = [1, 7, 1, 30, 1, 12]
    second = [
        Chunk(
            id=str(number),
            tokens=tuple((number + 5 * at) % VOCAB for at in range(length)),
            start=len(first[number].tokens) if number < 4 else 0,
            blocks=tuple(range(4 * number, 4 * number + 4)),
            samples=number != 3,
        )
        for number, length in enumerate(lengths)
    ]
    third = [
        Chunk(id=each.id, tokens=(3,), start=each.start + len(each.tokens), blocks=each.blocks, samples=True)
        for each in second
    ]
    return [first, second, third]


CUTS = {
    "halves": None,
    "thirds": dict.fromkeys(("kqv", "decode_attention", "prefill_attention", "o", "up_gate", "down"), (1 / 3, 2 / 3)),
    "uneven": {"kqv": (0.1, 0.3, 0.8), "decode_attention": (0.25, 0.5, 0.75), "o": (0.6,), "down": (0.4,)},
    "whole": {},
}


@pytest.mark.parametrize("executor", [Sequential(), THREADS], ids=["sequential", "threads"])
@pytest.mark.parametrize("cuts", CUTS)
def test_outputs_equal_those_of_the_whole_batch(cuts, executor):
    model = decoder()
    options = {"num_blocks": BLOCKS, "block_tokens": 16}
    whole = logits_of(ModelRunner(model, **options), steps())
    nano = NanoRunner(model, parts=CUTS[cuts], executor=executor, min_tokens=2, tile=1, **options)
    for ours, theirs in zip(logits_of(nano, steps()), whole, strict=True):
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() <= CLOSE
    assert nano.num_cut == 3


@pytest.mark.parametrize("preset", ["moe", "moe-shared", "rmoe", "rexmoe-open", "chain", "versatile", "duo"])
def test_every_design_runs_cut(preset):
    run = presets.find(preset)("tiny")
    model = run.model.replace(num_layers=2, vocab_size=VOCAB).build(seed=2)
    options = {"num_blocks": BLOCKS, "use_kernel": False}
    whole = logits_of(ModelRunner(model, **options), steps())
    nano = NanoRunner(model, executor=THREADS, min_tokens=2, tile=1, **options)
    for ours, theirs in zip(logits_of(nano, steps()), whole, strict=True):
        assert (ours - theirs).abs().max() <= CLOSE
    assert nano.num_cut == 3


def test_integers_are_equal_under_any_split():
    """Products of small whole numbers are exact in float32, so no rounding may hide a row that went astray."""
    x_TW = torch.arange(24.0).view(8, 3) % 5
    w_WF = torch.arange(6.0).view(3, 2) % 3
    for cuts in ([], [3], [1, 2, 7], list(range(1, 8))):
        operation = Operation("product", "compute", 0, 8, (), float)
        graph = LayerGraph((operation,), 8, ("product",), ("product",)).split({"product": cuts})
        y_TF = torch.full((8, 2), -1.0)

        def work(layer, op, y_TF=y_TF):
            y_TF[op.start : op.end] = x_TW[op.start : op.end] @ w_WF

        THREADS.run(Schedule(graph, list_order(graph)), work, 1)
        assert torch.equal(y_TF, x_TW @ w_WF)


def test_small_steps_streams_and_recorded_routing_run_whole():
    options = {"num_blocks": BLOCKS, "executor": Sequential()}
    nano = NanoRunner(decoder(), min_tokens=256, **options)
    logits_of(nano, steps())
    assert nano.num_cut == 0
    streams = presets.find("parscale")("tiny").model.replace(num_layers=2, vocab_size=VOCAB).build(seed=0)
    nano = NanoRunner(streams, min_tokens=2, tile=1, **options)
    logits_of(nano, steps())
    assert nano.num_cut == 0
    nano = NanoRunner(decoder(MoE.Config(num_experts=4, hidden_dim=16)), min_tokens=2, tile=1, **options)
    (chunk,) = chunks([40])
    batch = Batch(step=0, chunks=(chunk,), new=(Request(id="0", prompt=chunk.tokens, record_routing=True),))
    (sampled,) = nano.run(batch)
    assert nano.num_cut == 0
    assert set(sampled.routing) == {0, 1, 2}


def test_a_searched_pipeline_says_where_to_cut():
    pipeline = search(find_shape("llama-3-8b"), find_hardware("a100"), Workload(dense_batch=1024), evaluations=300)
    model = decoder()
    whole = logits_of(ModelRunner(model, num_blocks=BLOCKS), steps())
    nano = NanoRunner(model, pipeline=pipeline, executor=THREADS, min_tokens=2, tile=1, num_blocks=BLOCKS)
    for ours, theirs in zip(logits_of(nano, steps()), whole, strict=True):
        assert (ours - theirs).abs().max() <= CLOSE
    with pytest.raises(InputError, match="give one"):
        NanoRunner(model, pipeline=pipeline, parts={}, num_blocks=BLOCKS)


def graph_of(*operations):
    made = tuple(Operation(name, resource, 0, 2, after, float) for name, resource, after in operations)
    return LayerGraph(made, 2, (made[0].name,), (made[-1].name,)).split({name: [1] for name, *_ in operations})


def test_threads_overlap_keep_dependences_and_restore_settings():
    graph = graph_of(("a", "compute", ()), ("b", "memory", ("a",)), ("c", "compute", ("b",)))
    schedule = Schedule(graph, list_order(graph))
    done, names, both = [], set(), []
    lock, together = threading.Lock(), threading.Barrier(2)
    running = set()

    def work(layer, op):
        with lock:
            running.add(op.resource)
            both.append(len(running))
            names.add(threading.current_thread().name)
            number = graph.ops.index(op)
            assert all((layer, other) in done for other in graph.before[number])
            assert not layer or all((layer - 1, other) in done for other in graph.before_next[number])
        if (layer, graph.ops[number].name) in ((0, "a.1"), (0, "b.0")):
            # Each waits until the other has begun.
            together.wait(60)
        with lock:
            done.append((layer, graph.ops.index(op)))
            running.discard(op.resource)

    before = torch.get_num_threads()
    THREADS.run(schedule, work, 3)
    assert sorted(done) == [(layer, number) for layer in range(3) for number in range(6)]
    assert max(both) == 2
    assert len(names) == 2
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("where", ["a", "b", "c"])
def test_an_error_ends_all_threads_and_comes_out(where):
    graph = graph_of(("a", "compute", ()), ("b", "memory", ("a",)), ("c", "compute", ("b",)))

    def work(layer, op):
        if op.op == where and layer == 1:
            raise ValueError(f"{op.name} failed")

    before = threading.active_count()
    with pytest.raises(ValueError, match=f"{where}.0 failed"):
        THREADS.run(Schedule(graph, list_order(graph)), work, 3)
    assert threading.active_count() == before


def test_wrong_cores_and_missing_devices():
    with pytest.raises(InputError, match="cores has disk=1"):
        Threads({"disk": 1})
    if not torch.cuda.is_available():
        with pytest.raises(BackendError, match="CUDA"):
            Streams()
    assert isinstance(default_executor(torch.device("cpu")), Sequential | Threads)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_streams_give_the_same():
    model = decoder().to("cuda")
    options = {"num_blocks": BLOCKS, "use_kernel": False}
    whole = logits_of(ModelRunner(model, **options), steps())
    nano = NanoRunner(model, executor=Streams(), min_tokens=2, tile=1, **options)
    for ours, theirs in zip(logits_of(nano, steps()), whole, strict=True):
        assert (ours - theirs).abs().max() <= 1e-4
