"""ParScale: identities, a naive reference, caches, the gate, recipes, the published numbers, folders, errors."""

import copy
import inspect
import json
import logging
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from anabranch.config import from_dict, to_dict
from anabranch.data import DataConfig, Files
from anabranch.depth.duo_llm import DuoFFN, learned_router
from anabranch.errors import CheckpointError, ConfigError
from anabranch.experts.chain import Chain
from anabranch.experts.parscale import (
    HARDWARE,
    PAPER_LOSSES,
    Hardware,
    ParScale,
    add_streams,
    cost_model,
    diversity,
    export_parscale,
    fit_parallel_law,
    fold,
    init_from_tokens,
    load_parscale,
    measure_hardware,
    remove_streams,
    set_streams,
    wrap,
)
from anabranch.experts.versatile import VersatileFFN
from anabranch.lm import Decoder, SamplingConfig, generate, load_config, load_model, save_model
from anabranch.lm.cache import KeyValueCache
from anabranch.nn import MoE, SelfAttention, SwiGLU
from anabranch.nn.causal import SHORT
from anabranch.nn.rotary import rotate
from anabranch.routing import BiasBalancer, Router, SwitchLoss, record_routing
from anabranch.testing import check_task
from anabranch.train import RunConfig, TaskRunConfig, TextTask, TrainConfig, Trainer, read_metrics
from anabranch.train.optimizer import make_optimizer
from ranks import run_ranks

VOCAB, DIM, LAYERS = 31, 16, 3
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


def parscale(num_streams=3, **changes):
    return ParScale.Config(**{"num_streams": num_streams, "prefix_len": 4, "embedding_dim": 5, "mlp_dim": 6, **changes})


def config_of(streams=None, **changes):
    config = Decoder.Config(
        vocab_size=VOCAB,
        dim=DIM,
        num_layers=LAYERS,
        attention=SelfAttention.Config(num_heads=4, num_kv_heads=2),
        feed_forward=SwiGLU.Config(hidden_dim=24),
        init_std=0.2,
        max_positions=64,
        streams=streams,
    )
    return config.replace(**changes)


def model_of(streams=None, *, seed=0, **changes):
    model = config_of(streams, **changes).build(seed=seed).eval()
    if model.streams is not None and model.streams.prefix is not None and model.config.streams.prefix == "direct":
        with torch.no_grad():  # far from zero, so that streams differ visibly
            for parameter in model.streams.prefix.parameters():
                parameter.mul_(50)
    return model


def tokens(batch=2, length=9, seed=0):
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def num_parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


# ---- one stream ---------------------------------------------------------------------------------------------------------------


def test_one_stream_is_the_plain_model_to_the_bit():
    plain, single = model_of(), model_of(ParScale.Config(num_streams=1))
    assert list(plain.state_dict()) == list(single.state_dict())
    token_BL = tokens()
    ours, theirs = single.train()(token_BL, token_BL), plain.train()(token_BL, token_BL)
    assert torch.equal(ours.loss, theirs.loss)
    ours.loss.backward()
    theirs.loss.backward()
    for (name, parameter), other in zip(plain.named_parameters(), single.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad), name
    assert single.config.count() == plain.config.count()


def test_the_backbone_starts_as_the_plain_model_of_the_same_seed():
    plain, ours = model_of(seed=3), model_of(parscale(), seed=3)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, ours.state_dict()[name]), name


def test_switched_to_one_stream_it_is_the_plain_model():
    ours, plain = model_of(parscale()), model_of()
    set_streams(ours, 1)
    assert torch.equal(ours(tokens()).logits_BLV, plain(tokens()).logits_BLV)
    assert generate(ours, [[1, 2]], SamplingConfig(max_tokens=4, temperature=0)) == generate(
        plain, [[1, 2]], SamplingConfig(max_tokens=4, temperature=0)
    )


# ---- against a naive reference ------------------------------------------------------------------------------------------------


def naive_logits(model, token_BL):
    """Stream after stream, sequence after sequence, query after query."""
    config, streams = model.config, model.streams
    attention = config.attention
    head_dim = attention.width(config.dim)
    group = attention.num_heads // attention.kv_heads
    prefixes = streams.prefixes()
    hidden_PBLD = []
    for stream in range(config.streams.num_streams):
        rows = []
        for token_L in token_BL:
            x_LD = model.embedding(token_L)
            cos, sin = model.rotary(torch.arange(len(token_L))[None], x_LD.dtype)
            for layer, block in enumerate(model.blocks):
                query, key, value = block.attention.qkv(block.attention_norm(x_LD)).split(block.attention.split, -1)
                query, key, value = (part.unflatten(-1, (-1, head_dim)).transpose(0, 1) for part in (query, key, value))
                query, key = rotate(query[None], (cos, sin))[0], rotate(key[None], (cos, sin))[0]
                heads = []
                for head in range(attention.num_heads):
                    store = head // group
                    keys = torch.cat([prefixes[layer][0][stream, store], key[store]])
                    values = torch.cat([prefixes[layer][1][stream, store], value[store]])
                    outputs = []
                    for position in range(len(token_L)):
                        seen = streams.num_prefix + position + 1
                        weight = (keys[:seen] @ query[head, position] / math.sqrt(head_dim)).softmax(0)
                        outputs.append(weight @ values[:seen])
                    heads.append(torch.stack(outputs))
                x_LD = x_LD + block.attention.out(torch.cat(heads, dim=-1))
                x_LD = x_LD + block.feed_forward(block.feed_forward_norm(x_LD))
            rows.append(model.norm(x_LD))
        hidden_PBLD.append(torch.stack(rows))
    num_streams, smoothing = len(hidden_PBLD), config.streams.smoothing
    gate = streams.gates[str(num_streams)]
    merged = torch.zeros_like(hidden_PBLD[0])
    for b in range(token_BL.shape[0]):
        for i in range(token_BL.shape[1]):
            entry = torch.zeros(config.dim * num_streams)
            for f in range(config.dim):
                for p in range(num_streams):
                    entry[f * num_streams + p] = hidden_PBLD[p][b, i, f]
            z = gate[2].weight @ F.silu(gate[0].weight @ entry + gate[0].bias) + gate[2].bias
            w = (1 - smoothing) * z.softmax(0) + smoothing / num_streams
            merged[b, i] = sum(w[p] * hidden_PBLD[p][b, i] for p in range(num_streams))
    return model.logits(merged)


@pytest.mark.parametrize("prefix", ["mlp", "direct"])
def test_it_computes_what_the_paper_says(prefix):
    model = model_of(parscale(prefix=prefix, smoothing=0.1))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens(2, 6)).logits_BLV, naive_logits(model, tokens(2, 6)), **TOLERANCE)
        plain = remove_streams(model)
        assert not torch.allclose(model(tokens()).logits_BLV, plain(tokens()).logits_BLV, atol=1e-2)


def test_gradients_reach_everything_and_do_not_change_with_recompute():
    model = model_of(parscale()).train()
    token_BL = tokens()
    model(token_BL, token_BL).loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    assert all(gradient.abs().sum() > 0 for gradient in gradients.values())
    model.zero_grad()
    model.recompute = True
    model(token_BL, token_BL).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], **TOLERANCE)


def test_equal_prefixes_give_the_single_stream_with_that_prefix_for_any_gate():
    model = model_of(parscale(prefix="direct", smoothing=0.3))
    single = model_of(parscale(1, prefix="direct", prefix_alone=True))
    with torch.no_grad():
        for kind in ("key", "value"):
            for many, one in zip(
                getattr(model.streams.prefix, kind), getattr(single.streams.prefix, kind), strict=True
            ):
                many.copy_(one.expand_as(many))
        expected = single(tokens()).logits_BLV
        for scale in (0.0, 1.0, 30.0):
            gated = copy.deepcopy(model)
            gated.streams.gates["3"][2].weight.mul_(scale)
            torch.testing.assert_close(gated(tokens()).logits_BLV, expected, **TOLERANCE)


def test_copies_without_a_prefix_are_the_plain_model(caplog):
    with caplog.at_level(logging.WARNING):
        model = model_of(parscale(prefix_len=0))
    assert "all 3 streams compute the same" in caplog.text
    with torch.no_grad():
        torch.testing.assert_close(model(tokens()).logits_BLV, model_of()(tokens()).logits_BLV, **TOLERANCE)


def test_permuted_streams_with_a_permuted_gate_give_the_same():
    model = model_of(parscale(prefix="direct"))
    other = copy.deepcopy(model)
    order = torch.tensor([2, 0, 1])
    with torch.no_grad():
        for parameter in other.streams.prefix.parameters():
            parameter.copy_(parameter[order])
        first, last = other.streams.gates["3"][0], other.streams.gates["3"][2]
        first.weight.copy_(first.weight.unflatten(1, (DIM, 3))[:, :, order].flatten(1))
        last.weight.copy_(last.weight[order])
        last.bias.copy_(last.bias[order])
        torch.testing.assert_close(other(tokens()).logits_BLV, model(tokens()).logits_BLV, **TOLERANCE)


@given(
    num_streams=st.integers(2, 6),
    smoothing=st.floats(0, 0.9),
    scale=st.floats(0, 1e3),
    seed=st.integers(0, 2**31),
)
def test_weights_sum_to_one_and_none_is_below_its_share(num_streams, smoothing, scale, seed):
    streams = model_of(parscale(num_streams, smoothing=smoothing), num_layers=1).streams
    x = scale * torch.randn(num_streams, 2, 3, DIM, generator=torch.Generator().manual_seed(seed))
    weight_BLP = streams.weights(x)
    assert weight_BLP.dtype == torch.float32
    torch.testing.assert_close(weight_BLP.sum(-1), torch.ones(2, 3))
    assert (weight_BLP >= smoothing / num_streams - 1e-7).all()
    assert (streams.weights(x.bfloat16().float()).dtype, streams.weights(x).shape) == (
        torch.float32,
        (2, 3, num_streams),
    )


# ---- caches, padding, generation ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [[9], [1] * 9, [4, 1, 1, 3]], ids=str)
def test_cached_is_uncached(steps):
    model, token_BL = model_of(parscale()), tokens()
    cache, start, parts = model.new_cache(9), 0, []
    with torch.no_grad():
        for step in steps:
            parts.append(model(token_BL[:, start : start + step], cache=cache).logits_BLV)
            start += step
        torch.testing.assert_close(torch.cat(parts, dim=1), model(token_BL).logits_BLV, **TOLERANCE)
    assert cache.length == 9  # positions, without the prefix
    # fp32: key and value, layers, P B rows of L and P prefixes of M entries, heads, width
    assert cache.size_bytes == 4 * 2 * LAYERS * (3 * 2 * 9 + 3 * 4) * 2 * 4


class Copying(KeyValueCache):
    """A cache as it was: the prefix stands in the buffers, in front of each row."""

    def __init__(self, cache):
        prefix, self.copied = cache.prefix, set()
        super().__init__(cache.num_layers, cache.max_length + len(prefix), num_streams=cache.num_streams, prefix=prefix)

    def front(self, layer, rows=None):
        return None

    def begin(self, length=None):
        """No pass fails here, and lengths are counted otherwise."""

    def append(self, layer, key_BHLD, value_BHLD, **options):
        shift = len(self.prefix)
        if layer not in self.copied:
            self.copied.add(layer)
            super().append(layer, *self.prefix.rows(layer, key_BHLD), **options)
        self.length += shift
        made = super().append(layer, key_BHLD, value_BHLD, **options)
        self.length -= shift
        return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_shared_prefix_gives_what_one_in_front_of_each_row_gave(dtype):
    model, token_BL = model_of(parscale(3), num_layers=3).to(dtype), tokens(4, 40)
    shared, copying = (model.new_cache(40) for _ in range(2))
    copying = Copying(copying)
    start = 0
    for step in (17, 16, 1, 1, 5):
        part_BL = token_BL[:, start : start + step]
        with torch.no_grad():
            ours, before = (model(part_BL, cache=cache).logits_BLV for cache in (shared, copying))
        if step >= SHORT:  # put together as before; few queries are summed in another order
            assert torch.equal(ours, before)
        torch.testing.assert_close(ours, before, rtol=0, atol=2e-6 if dtype == torch.float32 else 1e-14)
        start += step
    rows = 3 * 4 * 40  # P B L
    each = 2 * 3 * 2 * 4 * dtype.itemsize  # key and value, layers, heads, width
    assert shared.size_bytes == each * (rows + 3 * 4)
    buffers = sum(slot.key_BHSD.nbytes + slot.value_BHSD.nbytes for slot in copying._slots.values())
    assert buffers == each * (rows + 3 * 4 * 4)


def test_left_padding_changes_nothing():
    model, token_BL = model_of(parscale()), tokens()
    mask_BL = torch.ones_like(token_BL, dtype=torch.bool)
    mask_BL[0, :3] = False
    with torch.no_grad():
        padded = model(token_BL, token_mask_BL=mask_BL).logits_BLV
        torch.testing.assert_close(padded[:1, 3:], model(token_BL[:1, 3:]).logits_BLV, **TOLERANCE)
        torch.testing.assert_close(padded[1:], model(token_BL[1:]).logits_BLV, **TOLERANCE)
        cache = model.new_cache(9)
        model(token_BL[:, :5], cache=cache, token_mask_BL=mask_BL[:, :5])
        rest = model(token_BL[:, 5:], cache=cache).logits_BLV
        torch.testing.assert_close(rest, padded[:, 5:], **TOLERANCE)


def test_the_prefix_takes_no_position():
    model = model_of(parscale())
    context = model.context(tokens(2, 5))
    assert context.position_BL.tolist() == [[0, 1, 2, 3, 4]] * 6
    cache = model.new_cache(8)
    model(tokens(2, 5), cache=cache)
    assert model.context(tokens(2, 2), cache=cache).position_BL.tolist() == [[5, 6]] * 6


def test_beams_move_with_all_their_streams():
    model, token_BL = model_of(parscale()), tokens(3, 6)
    order = torch.tensor([2, 0, 0, 1])  # reordered, and one more
    with torch.no_grad():
        cache = model.new_cache(8)
        model(token_BL, cache=cache)
        cache.keep_rows(order)
        moved = model(tokens(4, 1, seed=5), cache=cache).logits_BLV
        fresh = model(torch.cat([token_BL[order], tokens(4, 1, seed=5)], dim=1), last_only=True).logits_BLV
        torch.testing.assert_close(moved, fresh, **TOLERANCE)
        cache.keep_rows(torch.tensor([True, False, False, True]))
        left = model(tokens(2, 1, seed=6), cache=cache).logits_BLV
        whole = torch.cat([token_BL[order], tokens(4, 1, seed=5)], dim=1)[[0, 3]]
        fresh = model(torch.cat([whole, tokens(2, 1, seed=6)], dim=1), last_only=True).logits_BLV
        torch.testing.assert_close(left, fresh, **TOLERANCE)


def test_generation_of_a_batch_is_that_of_each_prompt_and_of_no_cache():
    model = model_of(parscale())
    greedy = SamplingConfig(max_tokens=5, temperature=0)
    prompts = [[1, 2, 3, 4], [7], [9, 8]]
    together = generate(model, prompts, greedy)
    assert together == [generate(model, [prompt], greedy)[0] for prompt in prompts]
    text = list(prompts[1])
    with torch.no_grad():
        for token in together[1]:
            assert int(model(torch.tensor([text])).logits_BLV[0, -1].argmax()) == token
            text.append(token)
    stopping = SamplingConfig(max_tokens=5, temperature=0, stop=(together[0][1],))
    assert generate(model, prompts, stopping)[1:] == [generate(model, [prompt], stopping)[0] for prompt in prompts[1:]]


def test_decoding_multiplies_each_matrix_once_for_all_streams():
    model = model_of(parscale(4))
    seen = []
    for block in model.blocks:
        block.feed_forward.w13.register_forward_hook(lambda module, args, output: seen.append(args[0].shape))
    cache = model.new_cache(4)
    model(tokens(1, 2), cache=cache)
    seen.clear()
    model(tokens(1, 1), cache=cache)
    assert seen == [(4, 1, DIM)] * LAYERS


def test_an_empty_batch_gives_no_logits():
    assert model_of(parscale())(tokens()[:0]).logits_BLV.shape == (0, 9, VOCAB)


def test_bf16_is_close():
    model, token_BL = model_of(parscale()), tokens()
    loss = model(token_BL, token_BL).loss
    with torch.autocast("cpu", torch.bfloat16):
        assert abs(model(token_BL, token_BL).loss - loss) < 2e-2 * loss
    half = copy.deepcopy(model).bfloat16()
    assert abs(half(token_BL, token_BL).loss - loss) < 5e-2 * loss
    assert generate(half, [[1, 2]], SamplingConfig(max_tokens=2, temperature=0))[0]


@pytest.mark.slow
def test_it_compiles_into_one_graph():
    model, token_BL = model_of(parscale()).train(), tokens()
    expected = model(token_BL, token_BL).loss
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(token_BL, token_BL).loss, expected, **TOLERANCE)


# ---- switching ----------------------------------------------------------------------------------------------------------------


def test_fewer_streams_use_the_first_prefixes_and_their_own_gate():
    model = model_of(parscale(4, switchable=(2,), prefix="direct"))
    smaller = model_of(parscale(2, prefix="direct"))
    with torch.no_grad():
        for kind in ("key", "value"):
            for many, two in zip(
                getattr(model.streams.prefix, kind), getattr(smaller.streams.prefix, kind), strict=True
            ):
                two.copy_(many[:2])
        smaller.streams.gates["2"].load_state_dict(model.streams.gates["2"].state_dict())
        four = model(tokens()).logits_BLV
        set_streams(model, 2)
        torch.testing.assert_close(model(tokens()).logits_BLV, smaller(tokens()).logits_BLV, **TOLERANCE)
        set_streams(model, 4)
        assert torch.equal(model(tokens()).logits_BLV, four)


@pytest.mark.parametrize("chosen", [1, 2, 4])
def test_the_number_of_streams_is_saved_with_the_model(tmp_path, chosen):
    model = model_of(parscale(4, switchable=(2,)))
    set_streams(model, chosen)
    save_model(tmp_path / "m", model)
    again, _ = load_model(tmp_path / "m")
    assert again.eval().streams.num_streams == chosen
    with torch.no_grad():
        assert torch.equal(again(tokens()).logits_BLV, model(tokens()).logits_BLV)
        set_streams(again, 4)
        save_model(tmp_path / "m", again)
    assert load_config(tmp_path / "m") == model.config


def test_a_call_says_how_many_streams_and_nothing_stays():
    model, prompts = model_of(parscale(4, switchable=(2,))), tokens().tolist()
    config = SamplingConfig(max_tokens=5, temperature=0)
    with torch.no_grad():
        asked = {number: model(tokens(), num_streams=number).logits_BLV for number in (1, 2, 4)}
    written = {number: generate(model, prompts, config, num_streams=number) for number in (1, 2, 4)}
    assert model.streams.num_streams == 4
    for number in (4, 2, 1):
        set_streams(model, number)
        with torch.no_grad():
            assert torch.equal(model(tokens()).logits_BLV, asked[number])
        assert generate(model, prompts, config) == written[number]
    with torch.no_grad():
        assert torch.equal(model(tokens(), num_streams=4).logits_BLV, asked[4])
    assert not torch.equal(asked[2], asked[4])


def test_numbers_of_streams_that_there_are_not():
    model = model_of(parscale(4, switchable=(2,)))
    with pytest.raises(
        ConfigError, match=r"^num_streams is 3, but the model has gates for 1, 2, 4; list it in switchable"
    ):
        model(tokens(), num_streams=3)
    with pytest.raises(ConfigError, match=r"^num_streams is 3, but the model has gates for 1, 2, 4"):
        parscale(4, switchable=(2,), in_use=3)
    with pytest.raises(ConfigError, match=r"^num_streams is 2, but the model has no streams; leave it out$"):
        model_of(None)(tokens(), num_streams=2)
    with pytest.raises(ConfigError, match=r"^the cache is for 2 streams .* the model runs 4"):
        model(tokens(), cache=model.new_cache(64, num_streams=2))


def test_training_takes_turns_and_evaluation_does_not():
    model = model_of(parscale(4, switchable=(2, 3))).train()
    assert [model.streams.config.of_step(step) for step in range(6)] == [2, 3, 4, 2, 3, 4]
    assert parscale(4).of_step(0) is None
    number = model.streams.config.of_step(0)
    model(tokens(), tokens(), num_streams=number).loss.backward()
    assert model.streams.num_streams == 4
    given = {name for name, parameter in model.streams.gates.named_parameters() if parameter.grad is not None}
    assert given == {"2.0.weight", "2.0.bias", "2.2.weight", "2.2.bias"}


# ---- recipes ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["mlp", "normal", "tokens"])
def test_streams_are_added_to_a_model_that_stays_as_it_is(init):
    plain = model_of()
    before = copy.deepcopy(plain.state_dict())
    grown = add_streams(plain, 3, init=init, prefix_len=4)
    for name, value in before.items():
        assert torch.equal(plain.state_dict()[name], value)
        assert torch.equal(grown.state_dict()[name], value)
        assert grown.state_dict()[name].data_ptr() != plain.state_dict()[name].data_ptr()
    assert all(torch.isfinite(parameter).all() for parameter in grown.parameters())
    assert torch.isfinite(grown(tokens()).logits_BLV).all()
    assert num_parameters(grown) == grown.config.count().parameters
    assert torch.equal(remove_streams(grown)(tokens()).logits_BLV, plain(tokens()).logits_BLV)


def test_prefixes_of_tokens_are_the_keys_and_values_of_that_text():
    """A stream with the prefix of a text answers like a model that read the text without it taking a position."""
    plain, text_PM = model_of(num_layers=1), tokens(2, 4, seed=7)
    grown = add_streams(plain, 2, init="tokens", text_PM=text_PM, prefix_len=4)
    block = plain.blocks[0]
    _, key, value = block.attention.qkv(block.attention_norm(plain.embedding(text_PM))).split(block.attention.split, -1)
    key = rotate(key.unflatten(-1, (2, 4)).transpose(1, 2), plain.rotary(torch.arange(4).expand(2, 4), key.dtype))
    torch.testing.assert_close(grown.streams.prefix.key[0], key, **TOLERANCE)
    torch.testing.assert_close(grown.streams.prefix.value[0], value.unflatten(-1, (2, 4)).transpose(1, 2), **TOLERANCE)


def test_an_adapter_trains_prefixes_and_gate_alone():
    model = add_streams(model_of(), 3, train="adapter", prefix_len=4).train()
    model(tokens(), tokens()).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == name.startswith("streams."), name
    optimizer = make_optimizer(model, TrainConfig())
    trained = sum(parameter.numel() for group in optimizer.param_groups for parameter in group["params"])
    assert trained == num_parameters(model.streams)


def test_one_number_of_several_can_be_kept_and_released(tmp_path):
    model = model_of(parscale(4, switchable=(2,)))
    kept = fold(model, 2)
    assert set(kept.streams.gates) == {"2"}
    set_streams(model, 2)
    assert torch.equal(kept(tokens()).logits_BLV, model(tokens()).logits_BLV)
    assert torch.equal(fold(model)(tokens()).logits_BLV, model(tokens()).logits_BLV)  # what was chosen stays
    export_parscale(tmp_path / "two", kept)
    assert fold(model, 1).streams is None
    with pytest.raises(ConfigError, match="num_streams is 3, but the model has gates for 1, 2, 4"):
        fold(model, 3)


def test_routers_under_an_adapter_are_not_balanced(run_config, tmp_path):
    router = Router.Config(balance=(BiasBalancer.Config(rate=0.1), SwitchLoss.Config()))
    plain = model_of(feed_forward=MoE.Config(num_experts=4, hidden_dim=8, router=router), vocab_size=257)
    for train in ("all", "adapter"):
        grown = add_streams(plain, 2, train=train, prefix_len=2).train()
        assert bool(grown(tokens(), tokens()).auxiliary) == (train == "all")
        Trainer(run_config.replace(model=grown.config), tmp_path / train, model=grown).fit()
        after = load_model(tmp_path / train)[0].state_dict()
        biases = [name for name in after if name.endswith("expert_bias")]
        assert len(biases) == LAYERS
        assert all(torch.equal(after[name], plain.state_dict()[name]) == (train == "adapter") for name in biases)


def test_folding_keeps_the_function_and_drops_the_network():
    model = model_of(parscale(3, switchable=(2,)))
    folded = fold(model)
    made = model.streams.prefix()
    for layer, (key, value) in enumerate(made):
        assert torch.equal(folded.streams.prefix.key[layer], key)
        assert torch.equal(folded.streams.prefix.value[layer], value)
    assert torch.equal(folded(tokens()).logits_BLV, model(tokens()).logits_BLV)
    assert not any("layers" in name for name in folded.streams.state_dict())
    assert num_parameters(folded) == folded.config.count().parameters


# ---- sizes --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "streams",
    [
        parscale(),
        parscale(prefix="direct"),
        parscale(4, switchable=(2, 3)),
        parscale(1),
        parscale(1, prefix_alone=True),
        parscale(2, prefix_len=0),
    ],
    ids=lambda streams: f"{streams.num_streams}-{streams.prefix}-{streams.prefix_len}-{len(streams.switchable)}",
)
def test_counts_are_real(streams):
    model = model_of(streams)
    assert num_parameters(model) == model.config.count().parameters


PUBLISHED = {  # width: (feed-forward, non-embedding parameters at P = 1)
    896: (4864, 535_813_376),
    1024: (5504, 693_753_856),
    2560: (13_824, 4_353_203_200),
}


@pytest.mark.parametrize("dim", PUBLISHED)
def test_parameters_are_the_published_ones(dim):
    hidden_dim, expected = PUBLISHED[dim]
    config = Decoder.Config(
        vocab_size=1,
        dim=dim,
        num_layers=36,
        attention=SelfAttention.Config(num_heads=16, num_kv_heads=2, qkv_bias=True),
        feed_forward=SwiGLU.Config(hidden_dim=hidden_dim),
        tie_embeddings=True,
    )
    plain = config.count()
    assert plain.parameters - dim == expected  # less the embedding of the one token
    added = {}
    for num_streams in (1, 2, 4, 8):
        counts = config.replace(streams=ParScale.Config(num_streams=num_streams, prefix="direct")).count()
        added[num_streams] = counts.parameters - plain.parameters
        in_table = {point[:2] for point in PAPER_LOSSES["pile"]}
        assert (expected + added[num_streams], num_streams) in in_table
    assert added[1] == 0
    if dim == 896:
        assert (added[2], added[4]) == (2_382_466, 4_764_036)


def test_flops_grow_with_streams_and_the_head_is_paid_once():
    plain, ours = config_of().count(8), config_of(parscale(4)).count(8)
    head = 2 * VOCAB * DIM
    gate = (4 * DIM + 1) * DIM + (DIM + 1) * 4
    met = LAYERS * 4 * DIM * 4  # a query of width D meets 4 prefix keys: 2 products of 2 D each
    assert ours.flops == head + 4 * (plain.flops - head + met) + 2 * (gate + 4 * DIM)
    assert ours.active == plain.active + gate + 2 * LAYERS * 2 * 4 * 4 * 4


# ---- the law ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("corpus", "e", "a", "alpha", "k", "r2"),
    [("stack", 0.691, 1.131e7, 0.189, 0.3935, 0.9978), ("pile", 1.289, 1.972e8, 0.196, 0.334, 0.9987)],
)
def test_the_law_fits_the_published_losses(corpus, e, a, alpha, k, r2):
    law = fit_parallel_law(PAPER_LOSSES[corpus])
    assert law.e == pytest.approx(e, abs=0.003)
    assert law.alpha == pytest.approx(alpha, abs=0.002)
    assert law.k == pytest.approx(k, abs=0.002)
    assert law.a == pytest.approx(a, rel=0.01)
    assert law.r2 == pytest.approx(r2, abs=2e-4)
    assert law.equivalent_params(1e9, 1) == 1e9
    assert law.equivalent_params(1e9, 8) == pytest.approx(1e9 * (1 + law.k * math.log(8)))
    assert law.intervals == {}


def test_the_fit_finds_a_law_it_was_given_and_intervals_grow_with_noise():
    noise = torch.randn(24, generator=torch.Generator().manual_seed(0)) * 1e-3
    points = [
        (n, p, ((2e7 / (n * (0.4 * math.log(p) + 1))) ** 0.2 + 1.2))
        for n in (1e8, 2e8, 5e8, 1e9, 2e9, 4e9)
        for p in (1, 2, 4, 8)
    ]
    exact = fit_parallel_law(points)
    assert (exact.k, exact.alpha, exact.e) == pytest.approx((0.4, 0.2, 1.2), rel=1e-3)
    assert exact.loss(3e8, 2) == pytest.approx((2e7 / (3e8 * (0.4 * math.log(2) + 1))) ** 0.2 + 1.2, rel=1e-5)
    noisy = [(n, p, loss * math.exp(float(e))) for (n, p, loss), e in zip(points, noise, strict=True)]
    law = fit_parallel_law(noisy, bootstrap=40)
    low, high = law.intervals["k"]
    assert low < law.k < high
    sure_low, sure_high = fit_parallel_law(points, bootstrap=20).intervals["k"]
    assert sure_high - sure_low < 0.01 < high - low
    assert law.k == pytest.approx(0.4, abs=0.03)


def test_diversity_of_equal_and_of_independent_streams():
    assert 8 ** (1 / 0.2) * diversity(8, 1.0, 0.2) == pytest.approx(1.0)
    assert diversity(8, 0.0, 0.2) == 1.0


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([(1e8, 1, 2.0)] * 9, "there are 1 different points of 1 sizes and 1 numbers of streams"),
        ([(1e8, 1, 2.0), (2e8, 2, -1.0)], "every point must have N > 0"),
    ],
)
def test_points_that_cannot_be_fitted_are_refused(points, message):
    with pytest.raises(ConfigError, match=message):
        fit_parallel_law(points)


# ---- cost ---------------------------------------------------------------------------------------------------------------------


def test_cost_by_hand():
    config = config_of(parscale(4, prefix="direct"))
    machine = Hardware(bandwidth=1e6, flops=1e30)  # reading is all that takes time
    cost = cost_model(config, input_tokens=10, output_tokens=4, hardware=machine, dtype=torch.float32)
    row = 2 * LAYERS * 2 * 4 * 4  # key and value, layers, heads, width, bytes
    assert cost.weight_bytes == 4 * config.count().parameters
    assert cost.cache_bytes == 4 * row * (4 + 14)
    assert cost.prefill_s == pytest.approx(cost.weight_bytes / 1e6)
    assert cost.decode_s == pytest.approx(4 * (cost.weight_bytes + 4 * row * (4 + 12)) / 1e6)
    assert cost.memory_bytes == cost.weight_bytes + cost.cache_bytes
    assert cost.latency_s == cost.prefill_s + cost.decode_s
    # The prefix is there once for each stream.
    many = cost_model(config, batch=3, input_tokens=10, output_tokens=4, hardware=machine, dtype=torch.float32)
    assert many.cache_bytes == 4 * row * (4 + 3 * 14)
    slow = cost_model(config, hardware=Hardware(1e30, 1e6), input_tokens=10, output_tokens=4)
    assert slow.prefill_s == pytest.approx(10 * config.count(10).flops / 1e6)


def test_streams_are_cheap_at_batch_1_and_not_when_multiplying_is_the_limit():
    config = Decoder.Config(dim=2048, num_layers=24, attention=SelfAttention.Config(num_heads=16, num_kv_heads=2))
    config = config.replace(
        feed_forward=SwiGLU.Config(hidden_dim=8192), streams=ParScale.Config(num_streams=8, prefix="direct")
    )
    ratios = [
        cost_model(config, batch=batch).latency_s / cost_model(config, num_streams=1, batch=batch).latency_s
        for batch in (1, 512)
    ]
    assert ratios[0] < 1.2 < 4 < ratios[1]


def test_hardware_is_measured_and_named():
    found = measure_hardware(size=64)
    # Of any machine: a byte takes more than a femtosecond and less than a microsecond, so does a product.
    assert 1e6 < found.bandwidth < 1e15
    assert 1e6 < found.flops < 1e15
    with pytest.raises(ConfigError, match=r"hardware is 'abacus'; known: laptop, a100, h100"):
        cost_model(config_of(), hardware="abacus")
    with pytest.raises(ConfigError, match="batch is 0"):
        cost_model(config_of(), batch=0, hardware=HARDWARE["h100"])
    with pytest.raises(ConfigError, match="the config has no streams"):
        cost_model(config_of(), num_streams=2)


def test_a_network_makes_keys_and_values_of_its_own():
    """The first half of what W_2 gives is the keys, the second the values."""
    prefix = model_of(parscale(prefix="mlp")).streams.prefix
    for layer, (key_PHMD, value_PHMD) in zip(prefix.layers, prefix(), strict=True):
        keys, values = layer(prefix.embedding_PC).chunk(2, dim=-1)
        assert torch.equal(key_PHMD.flatten(1), keys)
        assert torch.equal(value_PHMD.flatten(1), values)


# ---- folders ------------------------------------------------------------------------------------------------------------------


def test_config_and_model_read_back_equal(tmp_path):
    model = model_of(parscale(3, switchable=(2,), train="adapter"))
    assert from_dict(Decoder.Config, json.loads(json.dumps(to_dict(model.config)))) == model.config
    save_model(tmp_path / "model", model)
    again, _ = load_model(tmp_path / "model")
    assert torch.equal(again(tokens()).logits_BLV, model(tokens()).logits_BLV)
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in model.parameters()]


def test_prefixes_that_are_missing_are_not_left_uninitialised(tmp_path):
    save_model(tmp_path / "model", model_of())
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["model"]["streams"] = to_dict(parscale(2, prefix="direct"))
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"lacks streams.prefix.key.0"):
        load_model(tmp_path / "model")


def test_the_released_layout_goes_out_and_comes_back(tmp_path):
    model = model_of(parscale(3))
    export_parscale(tmp_path / "qwen", model)
    from safetensors.torch import load_file

    stored = load_file(tmp_path / "qwen" / "model.safetensors")
    assert stored["model.layers.1.self_attn.prefix_k"].shape == (3, 2, 4, 4)
    assert stored["model.aggregate_layer.0.weight"].shape == (DIM, 3 * DIM)
    assert stored["model.aggregate_layer.2.weight"].shape == (3, DIM)
    table = json.loads((tmp_path / "qwen" / "config.json").read_text())
    assert (table["parscale_n"], table["parscale_n_tokens"], table["parscale_attn_smooth"]) == (3, 4, 0.01)
    again, tokenizer = load_parscale(tmp_path / "qwen")
    assert tokenizer is None
    torch.testing.assert_close(again.eval()(tokens()).logits_BLV, model(tokens()).logits_BLV, **TOLERANCE)


def test_the_export_of_one_stream_is_a_plain_qwen2_that_transformers_reads(tmp_path):
    from transformers import AutoModelForCausalLM

    model = model_of(ParScale.Config(num_streams=1))
    export_parscale(tmp_path / "qwen", model)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "qwen", dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens()).logits, model(tokens()).logits_BLV, **TOLERANCE)
        torch.testing.assert_close(
            load_parscale(tmp_path / "qwen")[0].eval()(tokens()).logits_BLV, model(tokens()).logits_BLV, **TOLERANCE
        )


def test_streams_are_what_transformers_gives_for_a_past_of_prefixes(tmp_path):
    from transformers import AutoModelForCausalLM, DynamicCache

    model = model_of(parscale(2, prefix="direct"))
    export_parscale(tmp_path / "plain", remove_streams(model))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32).eval()
    name = "cache" if "cache" in inspect.signature(theirs.model.forward).parameters else "past_key_values"
    token_BL = tokens()
    hidden = []
    with torch.no_grad():
        for stream in range(2):
            past = DynamicCache()
            for layer, (key, value) in enumerate(model.streams.prefixes()):
                past.update(key[stream].expand(2, -1, -1, -1), value[stream].expand(2, -1, -1, -1), layer)
            position_BL = torch.arange(token_BL.shape[1]).expand(2, -1)
            output = theirs.model(token_BL, **{name: past}, position_ids=position_BL)
            hidden.append(output.last_hidden_state)
        merged = model.streams.merge(torch.cat(hidden), model.context(token_BL))
        torch.testing.assert_close(model.logits(merged), model(token_BL).logits_BLV, atol=1e-4, rtol=1e-4)


def test_a_tied_head_that_is_stored_is_not_in_the_way(tmp_path):
    from safetensors.torch import load_file, save_file

    model = model_of(parscale(3), tie_embeddings=True)
    export_parscale(tmp_path / "qwen", model)
    stored = load_file(tmp_path / "qwen" / "model.safetensors")
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    save_file(stored, tmp_path / "qwen" / "model.safetensors", metadata={"format": "pt"})
    again, _ = load_parscale(tmp_path / "qwen")
    torch.testing.assert_close(again.eval()(tokens()).logits_BLV, model.eval()(tokens()).logits_BLV, **TOLERANCE)


def test_what_qwen2_lacks_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"Qwen2-ParScale has no .*several gates"):
        export_parscale(tmp_path / "out", model_of(parscale(3, switchable=(2,))))
    with pytest.raises(CheckpointError, match=r"feed_forward.kind='moe'"):
        export_parscale(tmp_path / "out", model_of(feed_forward=MoE.Config(num_experts=2, hidden_dim=8)))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(CheckpointError, match="model_type"):
        load_parscale(tmp_path / "other")


# ---- models of transformers ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama():
    """A tiny Llama with our weights, and the plain decoder they are of."""
    import tempfile

    from transformers import AutoModelForCausalLM

    from anabranch.lm import export_huggingface

    plain = model_of()
    with tempfile.TemporaryDirectory() as folder:
        export_huggingface(f"{folder}/llama", plain, family="llama")
        return AutoModelForCausalLM.from_pretrained(f"{folder}/llama", dtype=torch.float32).eval(), plain


@pytest.fixture
def llama_of_bytes():
    """A tiny Llama whose tokens are bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=257, **sizes))


@pytest.fixture
def both(llama):
    """The same streams around transformers' model and in ours."""
    options = {"prefix_len": 4, "embedding_dim": 5, "mlp_dim": 6}
    wrapped = wrap(copy.deepcopy(llama[0]), 3, **options).eval()
    ours = add_streams(llama[1], 3, **options).eval()
    ours.streams.load_state_dict(wrapped.streams.state_dict())
    return wrapped, ours


def test_wrapped_is_ours(both):
    wrapped, ours = both
    token_BL = tokens()
    mask_BL = torch.ones_like(token_BL, dtype=torch.bool)
    mask_BL[0, :3] = False
    with torch.no_grad():
        torch.testing.assert_close(wrapped(token_BL).logits_BLV, ours(token_BL).logits_BLV, atol=1e-4, rtol=1e-4)
        padded = [model(token_BL, token_mask_BL=mask_BL).logits_BLV[mask_BL] for model in both]
        torch.testing.assert_close(*padded, atol=1e-4, rtol=1e-4)
    losses = [model(token_BL, token_BL).loss for model in both]
    torch.testing.assert_close(*losses, atol=1e-4, rtol=1e-4)
    for loss in losses:
        loss.backward()
    for (name, mine), theirs in zip(
        ours.streams.named_parameters(), wrapped.streams.parameters(), strict=True
    ):  # they reach the prefixes through the cache
        torch.testing.assert_close(
            mine.grad, theirs.grad, atol=1e-4, rtol=1e-3, msg=lambda text, name=name: name + text
        )
    greedy = SamplingConfig(max_tokens=5, temperature=0)
    prompts = [[1, 2, 3, 4], [7], [9, 8]]
    assert generate(wrapped, prompts, greedy) == generate(ours, prompts, greedy)
    stopping = SamplingConfig(max_tokens=5, temperature=0, stop=(generate(ours, prompts, greedy)[0][1],))
    assert generate(wrapped, prompts, stopping) == generate(ours, prompts, stopping)


def test_wrapped_with_one_stream_is_the_model(both, llama):
    wrapped, _ = both
    cache = wrapped.new_cache(9)
    with torch.no_grad():
        wrapped.streams.set_streams(1)
        torch.testing.assert_close(wrapped(tokens()).logits_BLV, llama[0](tokens()).logits, **TOLERANCE)
    with pytest.raises(ConfigError, match="the cache is for 3 streams, the model runs 1"):
        wrapped(tokens(), cache=cache)


@pytest.mark.parametrize(("train", "streams"), [("all", 2), ("adapter", 2), ("adapter", 3)])
def test_a_wrapped_model_trains_by_the_trainer_and_resumes_to_the_bit(llama_of_bytes, run_config, train, streams):
    run = TaskRunConfig(task=TextTask.Config(data=run_config.data), train=run_config.train.replace(learning_rate=1e-2))
    options = {"prefix_len": 2, "switchable": tuple(range(2, streams))}
    check_task(run, ranks=False, model=wrap(llama_of_bytes, streams, train=train, **options))


def test_a_call_of_a_wrapped_model_says_how_many_streams(llama):
    wrapped = wrap(copy.deepcopy(llama[0]), 3, prefix_len=4, switchable=(2,)).eval()
    greedy = SamplingConfig(max_tokens=5, temperature=0)
    with torch.no_grad():
        asked = {number: wrapped(tokens(), num_streams=number).logits_BLV for number in (1, 2, 3)}
        written = {number: generate(wrapped, [[1, 2, 3]], greedy, num_streams=number) for number in (1, 2, 3)}
        for number in (1, 2, 3):
            wrapped.streams.set_streams(number)
            assert torch.equal(wrapped(tokens()).logits_BLV, asked[number])
            assert generate(wrapped, [[1, 2, 3]], greedy) == written[number]
    with pytest.raises(ConfigError, match="num_streams is 4, but the model has gates for 1, 2, 3"):
        wrapped(tokens(), num_streams=4)


def test_an_adapter_trained_around_a_model_is_all_that_moves(llama_of_bytes, run_config, tmp_path):
    wrapped = wrap(llama_of_bytes, 2, train="adapter", prefix_len=2)
    before = copy.deepcopy(wrapped.state_dict())
    run = TaskRunConfig(task=TextTask.Config(data=run_config.data), train=run_config.train)
    result = Trainer(run, tmp_path / "run", model=wrapped).fit()
    for name, value in wrapped.state_dict().items():
        if not name.startswith("streams."):
            assert torch.equal(value, before[name]), name
    from safetensors.torch import load_file

    moments = load_file(result.checkpoint / "optimizer.safetensors")
    assert {name.partition(".")[0] for name in moments} == {"streams"}
    assert math.isfinite(result.bits_per_byte)
    assert result.headline == result.nats_per_token


def test_a_wrapped_adapter_leaves_the_model_alone(llama):
    wrapped = wrap(copy.deepcopy(llama[0]), 2, train="adapter", prefix_len=2).train()
    wrapped(tokens(), tokens()).loss.backward()
    assert all(parameter.grad is None for parameter in wrapped.model.parameters())
    assert all(parameter.grad is not None for parameter in wrapped.streams.parameters())


def test_models_that_cannot_be_wrapped_are_refused(llama):
    with pytest.raises(ConfigError, match="Linear is no causal language model of transformers"):
        wrap(torch.nn.Linear(2, 2), 2)
    sliding = copy.deepcopy(llama[0])
    sliding.config.sliding_window = 8
    with pytest.raises(ConfigError, match="sliding_window=8"):
        wrap(sliding, 2)


# ---- with the rest ------------------------------------------------------------------------------------------------------------


def test_traces_hold_the_decisions_of_every_stream():
    model = model_of(parscale(3), feed_forward=MoE.Config(num_experts=4, hidden_dim=8))
    mask_BL = torch.ones(2, 9, dtype=torch.bool)
    mask_BL[0, :2] = False
    with torch.no_grad(), record_routing(model) as recorder:
        model(tokens(), token_mask_BL=mask_BL)
    trace = recorder.trace()
    assert trace.load_E(0).sum() == 3 * 16 * 2  # streams, real tokens, top 2
    positions = trace.table["position"].to_pylist()
    assert sorted(set(positions)) == list(range(9))


@pytest.fixture
def run_config(tmp_path):
    (tmp_path / "text").mkdir()
    for number in range(20):
        (tmp_path / "text" / f"{number}.txt").write_text(f"line {number} of some text that repeats\n" * 12)
    return RunConfig(
        model=config_of(parscale(), vocab_size=257, init_std=0.02),
        data=DataConfig(
            corpus=Files.Config(paths=(str(tmp_path / "text"),)), sequence_length=16, validation_fraction=0.2
        ),
        train=TrainConfig(steps=4, batch_size=4, eval_every=None, checkpoint_every=2, log_every=1, eval_tokens=128),
    )


def test_it_trains_measures_saves_and_generates(run_config, tmp_path):
    result = Trainer(run_config, tmp_path / "run").fit()
    assert math.isfinite(result.bits_per_byte)
    assert any("stream_entropy" in record for record in read_metrics(tmp_path / "run"))
    model, tokenizer = load_model(tmp_path / "run")
    assert model.config == run_config.model
    assert tokenizer is not None
    assert len(generate(model, [[1, 2, 3]], SamplingConfig(max_tokens=3))[0]) == 3


class Crash(Exception):  # noqa: N818
    pass


@pytest.mark.parametrize("streams", [parscale(), parscale(4, switchable=(2,))], ids=["all", "switchable"])
def test_a_stopped_run_goes_on_to_the_bit(run_config, tmp_path, streams):
    config = run_config.replace(model=run_config.model.replace(streams=streams))
    Trainer(config, tmp_path / "whole").fit()

    def stop(event):
        if event.kind == "checkpoint" and event.step == 2:
            raise Crash

    with pytest.raises(Crash):
        Trainer(config, tmp_path / "parts", on_event=stop).fit()
    Trainer(config, tmp_path / "parts", resume=True).fit()
    whole, parts = load_model(tmp_path / "whole")[0], load_model(tmp_path / "parts")[0]
    for name, value in whole.state_dict().items():
        assert torch.equal(value, parts.state_dict()[name]), name


def test_the_trainer_says_which_number_is_in_turn(run_config, tmp_path):
    config = run_config.replace(model=run_config.model.replace(streams=parscale(3, switchable=(2,), in_use=1)))
    model, said = config.model.build(seed=0), []
    model.register_forward_pre_hook(
        lambda model, given, options: said.append((model.training, options.get("num_streams"))), with_kwargs=True
    )
    before = {name: value for name, value in vars(model.streams).items() if isinstance(value, int)}
    Trainer(config, tmp_path / "run", model=model).fit()
    assert [number for training, number in said if training] == [2, 3, 2, 3]
    assert {number for training, number in said if not training} == {None}  # evaluations use what was chosen
    assert {name: vars(model.streams)[name] for name in before} == {**before, "training": True}


def test_compiled_passes_of_several_numbers():
    model = model_of(parscale(3, switchable=(2,)), num_layers=1).train()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for number in (2, 3):
        wanted = model(tokens(), tokens(), num_streams=number).loss
        torch.testing.assert_close(compiled(tokens(), tokens(), num_streams=number).loss, wanted)


def test_two_stages_and_an_adapter_run(run_config, tmp_path):
    first = run_config.replace(model=run_config.model.replace(streams=None))
    Trainer(first, tmp_path / "first").fit()
    plain, tokenizer = load_model(tmp_path / "first")
    for train in ("all", "adapter"):
        grown = add_streams(plain, 2, train=train, prefix_len=4, embedding_dim=5, mlp_dim=6)
        second = run_config.replace(model=grown.config)
        Trainer(second, tmp_path / train, model=grown, tokenizer=tokenizer).fit()
        trained, _ = load_model(tmp_path / train)
        same = [torch.equal(value, trained.state_dict()[name]) for name, value in plain.state_dict().items()]
        assert all(same) if train == "adapter" else not any(same)
        moved = trained.streams.state_dict()
        assert not torch.equal(
            moved["gates.2.0.weight"], add_streams(plain, 2).streams.state_dict()["gates.2.0.weight"]
        )


TRAIN = """
from anabranch.train import Trainer, read_run_config
for name in ("ddp", "fsdp"):
    print(Trainer(read_run_config("{folder}/" + name + ".config"), "{folder}/" + name).fit().status)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "streams",
    [parscale(), parscale(train="adapter"), parscale(3, switchable=(2,))],
    ids=["all", "adapter", "switchable"],
)
def test_replicas_and_shards_learn_as_one_process_does(run_config, tmp_path, streams):
    config = run_config.replace(model=run_config.model.replace(streams=streams))
    Trainer(config, tmp_path / "one").fit()
    for name in ("ddp", "fsdp"):
        (tmp_path / f"{name}.config").mkdir()
        config.replace(train=config.train.replace(parallel=name)).save(tmp_path / f"{name}.config")
    run_ranks(TRAIN.format(folder=tmp_path))
    losses = [record["loss"] for record in read_metrics(tmp_path / "one") if record["kind"] == "train"]
    for name in ("ddp", "fsdp"):
        found = [record["loss"] for record in read_metrics(tmp_path / name) if record["kind"] == "train"]
        assert found == pytest.approx(losses, abs=2e-5)
        ours, one = load_model(tmp_path / name)[0].state_dict(), load_model(tmp_path / "one")[0].state_dict()
        for key, value in one.items():
            torch.testing.assert_close(ours[key], value, rtol=0, atol=2e-3, msg=lambda text, key=key: f"{key}: {text}")


# ---- errors -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_streams": 0}, "num_streams is 0"),
        ({"prefix_len": -1}, "prefix_len is -1"),
        ({"smoothing": 1.0}, "smoothing is 1.0"),
        ({"smoothing": -0.1}, "smoothing is -0.1"),
        ({"train": "some"}, "train is 'some'"),
        ({"num_streams": 4, "switchable": (4,)}, "switchable has 4, but num_streams is 4; use numbers from 2 to 3"),
        ({"num_streams": 4, "switchable": (1,)}, "switchable has 1"),
    ],
)
def test_values_out_of_range_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        ParScale.Config(**options)


def test_a_cache_of_another_number_of_streams_is_refused():
    plain, ours = model_of(), model_of(parscale())
    with pytest.raises(ConfigError, match="the cache is for 1 streams with 0 prefix entries, the model runs 3 with 4"):
        ours(tokens(), cache=plain.new_cache(9))
    with pytest.raises(ConfigError, match="the cache is for 3 streams with 4 prefix entries, the model runs 1 with 0"):
        plain(tokens(), cache=ours.new_cache(9))
    cache = ours.new_cache(9)
    set_streams(ours, 1)
    with pytest.raises(ConfigError, match=r"make a new one with model\.new_cache"):
        ours(tokens(), cache=cache)


def test_a_number_of_streams_without_a_gate_is_refused():
    with pytest.raises(ConfigError, match="num_streams is 2, but the model has gates for 1, 3"):
        set_streams(model_of(parscale(3)), 2)


def test_models_that_have_none_or_some_are_refused():
    with pytest.raises(ConfigError, match="add them with add_streams"):
        set_streams(model_of(), 1)
    with pytest.raises(ConfigError, match="has streams already"):
        add_streams(model_of(parscale()), 2)
    with pytest.raises(ConfigError, match=r"a Linear; streams need a Decoder"):
        add_streams(torch.nn.Linear(2, 2), 2)
    with pytest.raises(ConfigError, match="init is 'zeros'"):
        add_streams(model_of(), 2, init="zeros")
    with pytest.raises(ConfigError, match="no prefixes to fold"):
        fold(model_of(parscale(2, prefix_len=0)))
    with pytest.raises(ConfigError, match="tokens can only set 'direct' prefixes"):
        init_from_tokens(model_of(parscale()))
    with pytest.raises(ConfigError, match=r"text_PM has shape \[1, 4\]; the prefixes need \[3, 4\]"):
        init_from_tokens(model_of(parscale(prefix="direct")), tokens(1, 4))


FROZEN_DESIGNS = {
    "moe": MoE.Config(num_experts=4, hidden_dim=16, capacity_factor=1.0),
    "duo": DuoFFN.Config(big=16, small=8),
    "learned duo": DuoFFN.Config(big=16, small=8, router=learned_router()),
    "versatile": VersatileFFN.Config(hidden_dim=16, num_experts=4),
    "chain": Chain.Config(num_experts=4, hidden_dim=8),
}


@pytest.mark.parametrize("name", FROZEN_DESIGNS)
@torch.no_grad()
def test_a_frozen_model_computes_in_training_what_it_computes_in_evaluation(name):
    """Prefixes and gate learn to go with the model that will be used, not with one that samples or mixes."""
    streams = ParScale.Config(num_streams=2, prefix_len=2, train="adapter")
    model = Decoder.Config(
        vocab_size=16, dim=16, num_layers=2, init_std=0.3, feed_forward=FROZEN_DESIGNS[name], streams=streams
    ).build(seed=0)
    token_BL = torch.arange(10).view(1, 10)
    expected = model.eval()(token_BL)
    found = model.train()(token_BL)
    assert torch.equal(found.logits_BLV, expected.logits_BLV)
    assert found.metrics.keys() == expected.metrics.keys() > {"stream_entropy"}
