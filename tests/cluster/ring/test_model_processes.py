"""Training and generation with sequences that are cut over real processes, against one process."""

import json
from pathlib import Path

import pytest
from ranks import run_ranks

SCRIPT = """
import json
from torch.nn.parallel import DistributedDataParallel
from anabranch.cluster.ring import ContextParallel, Traffic, average_gradients
from anabranch.lm import Decoder
from anabranch.nn import SelfAttention, SwiGLU

def decoder(**attention):
    return Decoder.Config(vocab_size=19, dim=16, num_layers=2,
        attention=SelfAttention.Config(num_heads=4, num_kv_heads=2, **attention),
        feed_forward=SwiGLU.Config(hidden_dim=24)).build(seed=3)

def batches(length, steps):
    generator = torch.Generator().manual_seed(5)
    for _ in range(steps):
        token = torch.randint(0, 19, (2, length + 1), generator=generator)
        yield token[:, :-1], token[:, 1:]

def curve(model, step):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for token, target in batches(LENGTH, STEPS):
        optimizer.zero_grad()
        losses.append(step(token, target))
        optimizer.step()
    return losses

def alone(model):
    def step(token, target):
        output = model(token, target)
        output.loss.backward()
        return output.loss.item()
    return step

def together(cut):
    def step(token, target):
        output = cut(token, target)
        output.loss.backward()
        if isinstance(cut, ContextParallel):
            average_gradients(cut)
        return output.cross_entropy.item()
    return step

found = {}
expected = decoder()
found["alone"] = curve(expected, alone(expected))
for layout, scheme in (("zigzag", "token_ring"), ("stripe", "ring"), ("contiguous", "auto")):
    model = decoder()
    found[f"{layout} {scheme}"] = curve(model, together(ContextParallel(model, layout=layout, scheme=scheme)))
model = decoder()
found["replicas"] = curve(model, together(DistributedDataParallel(ContextParallel(model))))
found["weights"] = max(float((one - other).abs().max()) for one, other in zip(model.parameters(), expected.parameters()))

# Windows and sinks, at a length that is no multiple.
for name, attention in (("window", {"window": 5}), ("sinks", {"sinks": True})):
    model = decoder(**attention)
    token, target = next(batches(13, 1))
    logits = ContextParallel(model)(token).logits_BLV
    found[name] = float((logits - model(token).logits_BLV).abs().max())

# Generation: the prompt at once, and in chunks; each rank has its share of the positions.
model = decoder()
token, _ = next(batches(13, 1))
cache, made = model.new_cache(64), []
with torch.no_grad():
    logits = model(token, cache=cache).logits_BLV[:, -1]
    for _ in range(5):
        made.append(logits.argmax(-1))
        logits = model(made[-1][:, None], cache=cache).logits_BLV[:, -1]
right = torch.stack(made, 1).tolist()
cut = ContextParallel(model)
found["generated"] = [cut.generate(token, 5).tolist() == right, cut.generate(token, 5, chunk=5).tolist() == right]
traffic = Traffic()
cut = ContextParallel(model, traffic=traffic)
cache = cut.new_cache()
cut.extend(token, cache)
traffic.sent = None
cut.extend(token[:, :1], cache)
found["decoded bytes"] = traffic.size_bytes
found["rows"] = cache.placement.rows

print(json.dumps(found))
sys.stdout.flush()
os._exit(0)
"""


@pytest.fixture(
    scope="module", params=[(2, 13, 6), pytest.param((4, 37, 50), marks=pytest.mark.slow)], ids=["2 ranks", "4 ranks"]
)
def ran(request, tmp_path_factory):
    """What each rank found."""
    world, length, steps = request.param
    folder: Path = tmp_path_factory.mktemp("ranks")
    return [json.loads(printed) for printed in run_ranks(f"LENGTH, STEPS = {length}, {steps}\n{SCRIPT}", folder, world)]


@pytest.mark.parametrize("case", ["zigzag token_ring", "stripe ring", "contiguous auto", "replicas"])
def test_a_loss_curve_is_that_of_one_process(ran, case):
    for rank in ran:
        differences = [abs(one - other) for one, other in zip(rank[case], rank["alone"], strict=True)]
        assert max(differences) <= 1e-5


def test_weights_stay_equal(ran):
    assert all(rank["weights"] <= 1e-4 for rank in ran)


@pytest.mark.parametrize("case", ["window", "sinks"])
def test_logits_are_those_of_one_process(ran, case):
    assert all(rank[case] <= 1e-5 for rank in ran)


def test_generation_is_that_of_one_process(ran):
    assert all(rank["generated"] == [True, True] for rank in ran)


def test_decoding_sends_partial_results_alone(ran):
    """Of 2 layers, 2 sequences, 4 heads: 4 numbers and the sum of a softmax, to each other rank."""
    for rank in ran:
        assert rank["decoded bytes"] == 2 * 2 * 4 * (4 + 1) * 4 * (len(ran) - 1)


def test_each_rank_holds_its_share(ran):
    assert all(max(rank["rows"]) - min(rank["rows"]) <= 1 for rank in ran)
