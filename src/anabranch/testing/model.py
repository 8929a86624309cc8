"""The contract of a design, checked inside a decoder, where it lives."""
# Shapes: B batch, L positions, V vocabulary

import copy
import pickle
from collections import Counter
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from anabranch.lm import Decoder
from anabranch.lm.backward_contract import check_gradients, check_second_derivatives, gradients_of_training
from anabranch.lm.replay_contract import check_partial_replay, check_replay, check_replayed_training
from anabranch.nn import Attention, Block, FeedForward, Linear, MoE, SelfAttention, SwiGLU
from anabranch.nn.streams import Streams
from anabranch.registry import resolve
from anabranch.routing import (
    UNUSED,
    record_routing,
)
from anabranch.routing.balance import LoadCounter
from anabranch.routing.discovery import find_routers, router_layers
from anabranch.testing.routing import check_routing
from anabranch.testing.shared import (
    VOCAB_SIZE,
    check_config,
    check_has_gradients,
    check_same_state,
    expect,
    expect_close,
    loads,
    no_counting,
    num_parameters,
    routers_of,
    routings_of,
)
from anabranch.train.hooks import StepHooks


def check_feed_forward(
    config: FeedForward.Config,
    *,
    num_layers: int = 4,
    dim: int = 32,
    device: str = "cpu",
    compile_backend: str = "aot_eager",
) -> None:
    """The contract of the family ``feed_forward``: all that trainer, generation, checkpoints and traces rely on.

    Args:
        config: the design, with small sizes.
        num_layers: depth of the decoder it is put in (at least what the design needs).
        dim: width of that decoder.
        device: where to check, one of `DEVICES`.
        compile_backend: of ``torch.compile``; ``inductor`` is slow to compile, ``aot_eager`` checks the same graph.
    """
    _check_model(_decoder(dim, num_layers, feed_forward=config), device, compile_backend)


def check_block(
    config: Block.Config, *, num_layers: int = 2, dim: int = 32, device: str = "cpu", compile_backend: str = "aot_eager"
) -> None:
    """The contract of the family ``block``: what `check_feed_forward` asks of a decoder of these. Arguments as there.

    A block whose config says that it passes no gradient stands beside a model that stays as it is. Nothing can learn that no gradient
    reaches, so the embedding and the blocks that are wrapped get none, and all else that is asked of parameters is asked of the rest.
    """
    _check_model(_decoder(dim, num_layers, block=config), device, compile_backend)


def check_attention(
    config: Attention.Config,
    *,
    num_layers: int = 2,
    dim: int = 32,
    device: str = "cpu",
    compile_backend: str = "aot_eager",
) -> None:
    """The contract of the family ``attention``: what `check_feed_forward` asks of a dense decoder with it.

    So no position sees a later one or padding; decoding with a cache gives what one pass gives, also where blocks are visited again; and
    gradients, checkpoints and ``torch.compile`` work. Besides, outputs have the shape of their inputs, and the cache keeps as much of a
    position as the config's ``kv_heads`` and ``kept`` say, by which memory is told before a model is built. Arguments as for
    `check_feed_forward`.
    """
    model_config = _decoder(dim, num_layers, attention=config)
    _check_attention_layers(model_config.build(seed=0).to(device).eval())
    _check_model(model_config, device, compile_backend)


def _check_attention_layers(model: Decoder) -> None:
    config, weight, (batch, length) = model.config.attention, model.embedding.weight, (3, 5)
    num_calls = 0

    def check(module: Attention, given: tuple[Tensor, ...], y_BLW: Tensor) -> None:
        nonlocal num_calls
        num_calls += 1
        x_BLW = given[0]
        shapes = f"{list(y_BLW.shape)} for inputs of {list(x_BLW.shape)}"
        expect(y_BLW.shape == x_BLW.shape, f"an output has shape {shapes}")
        expect(y_BLW.dtype == x_BLW.dtype, f"an output is {y_BLW.dtype} for inputs of {x_BLW.dtype}")

    for module in model.modules():
        if isinstance(module, Attention):
            module.register_forward_hook(check)
    cache = model.new_cache(length)
    with torch.no_grad():
        model(torch.zeros(batch, length, dtype=torch.int64, device=weight.device), cache=cache)
    expect(num_calls == len(model.blocks), f"{len(model.blocks)} blocks call attention {num_calls} times")
    kept = cache.size_bytes / (len(model.blocks) * batch * length * weight.itemsize)
    said = config.kv_heads * sum(config.kept(model.config.dim))
    expect(
        kept == said, f"kv_heads and kept say {said} numbers of a position in the cache of a layer; it keeps {kept:g}"
    )


def check_linear(
    config: Linear.Config,
    *,
    num_layers: int = 2,
    dim: int = 32,
    device: str = "cpu",
    compile_backend: str = "aot_eager",
) -> None:
    """The contract of the family ``linear``: what `check_feed_forward` asks of a decoder whose values and last matrices are these.

    The last matrices are those of a dense layer, and then those of a mixture's experts, which get gathered rows. Arguments as for
    `check_feed_forward`.
    """
    experts = MoE.Config(num_experts=2, hidden_dim=dim)
    for down, parts in (("", {}), ("experts.*.", {"feed_forward": experts})):
        linears = {"blocks.*.attention.v": config, f"blocks.*.feed_forward.{down}down": config}
        _check_model(_decoder(dim, num_layers, linears=linears, **parts), device, compile_backend)
    head = _decoder(dim, num_layers, linears={"head": config})
    _check_head(head.build(seed=0).to(device))
    parscale: Any = resolve("streams", "parscale")
    streams = parscale.Config(num_streams=2)
    _check_head(head.replace(streams=streams).build(seed=0).to(device))


def _check_head(model: Decoder) -> None:
    """A layer that is the head sees kept positions, of one stream, as those of the whole pass: padded, cached and recorded."""
    model.eval()
    token_BL = torch.randint(0, VOCAB_SIZE, (3, 9), generator=torch.Generator().manual_seed(1))
    token_BL = token_BL.to(model.embedding.weight.device)
    mask_BL = torch.ones_like(token_BL, dtype=torch.bool)
    mask_BL[0, :4] = False
    routers = {name: router for name, router in find_routers(model).items() if name.startswith("head.")}
    for given in ({}, {"token_mask_BL": mask_BL}):
        recorder: Any = record_routing(model, routers=routers) if routers else nullcontext()
        with torch.no_grad(), no_counting(model), recorder as recorded:
            whole_BLV = model(token_BL, **given).logits_BLV
            last_BLV = model(token_BL, last_only=True, **given).logits_BLV
        expect_close(last_BLV, whole_BLV[:, -1:], "the head gives the last positions alone other logits")
        if not routers:
            continue
        trace = recorded.trace()
        for layer in trace.layers:
            decisions = trace.decisions(layer.layer)
            found = list(zip(decisions.item_N.tolist(), decisions.position_N.tolist(), strict=True))
            expected = [(row, place) for row in range(3) for place in range(int(mask_BL[row].sum()) if given else 9)]
            expected += [(3 + row, int(mask_BL[row].sum()) - 1 if given else 8) for row in range(3)]
            expect(found == expected, f"{layer.name} is recorded of items and positions {found}, not {expected}")


def _decoder(dim: int, num_layers: int, **parts: Any) -> Decoder.Config:
    values: dict[str, Any] = {
        "feed_forward": SwiGLU.Config(hidden_dim=2 * dim),
        "attention": SelfAttention.Config(num_heads=4, num_kv_heads=2),
        **parts,
    }
    return Decoder.Config(
        vocab_size=VOCAB_SIZE,
        dim=dim,
        num_layers=num_layers,
        max_positions=64,
        # Far from even scores, so that rounding does not decide who is chosen.
        init_std=0.2,
        **values,
    )


def check_streams(
    config: Streams.Config,
    *,
    num_layers: int = 2,
    dim: int = 32,
    device: str = "cpu",
    compile_backend: str = "aot_eager",
) -> None:
    """The contract of the family ``streams``: what `check_feed_forward` asks of a dense decoder that runs as these streams.

    Also, the backbone must start as the plain model of the same seed does. Arguments as for `check_feed_forward`.
    """
    model_config = _decoder(dim, num_layers, streams=config)
    state = model_config.build(seed=0).state_dict()
    for name, value in model_config.replace(streams=None).build(seed=0).state_dict().items():
        expect(torch.equal(state[name], value), f"{name} does not start as in the plain model of the same seed")
    _check_model(model_config, device, compile_backend)


def _check_model(model_config: Decoder.Config, device: str, compile_backend: str) -> None:
    check_config(model_config)
    model = model_config.build(seed=0).to(device)
    check_same_state(model, model_config.build(seed=0).to(device), "built twice from one seed")
    counted, real = model_config.count().parameters, num_parameters(model)
    expect(counted == real, f"count() says {counted} parameters, there are {real}")
    token_BL = torch.randint(0, VOCAB_SIZE, (3, 12), generator=torch.Generator().manual_seed(1)).to(device)
    if not model_config.block.passes_gradient:
        _check_unreached(copy.deepcopy(model), token_BL)
        for part in _unreached(model):
            part.requires_grad_(False)
    for check in (
        _check_evaluation,
        _check_cache,
        _check_paths,
        _check_padding,
        _check_training,
        _check_recompute,
        check_gradients,
        check_second_derivatives,
        _check_state,
        _check_record,
        check_replay,
        check_partial_replay,
        check_replayed_training,
        _check_half_precision,
    ):
        check(copy.deepcopy(model), token_BL)
    _check_compile(model, token_BL, compile_backend)
    _check_learning(model, token_BL)


def _unreached(model: Decoder) -> list[nn.Module]:
    """What no gradient gets to through blocks that pass none: the embedding, and the blocks that they wrap."""
    inner = (part for block in model.blocks for part in block.modules() if part is not block)
    return [model.embedding, *(part for part in inner if isinstance(part, Block))]


def _check_unreached(model: Decoder, token_BL: Tensor) -> None:
    """Also where nobody froze them."""
    model.train()
    model(token_BL, token_BL.roll(-1, 1)).loss.backward()
    for name, parameter in model.named_parameters():
        if any(parameter is one for part in _unreached(model) for one in part.parameters()):
            expect(parameter.grad is None, f"{name} gets a gradient, through a block that says it passes none")


def _check_evaluation(model: Decoder, token_BL: Tensor) -> None:
    model.eval()
    with torch.no_grad(), no_counting(model):
        logits_BLV = model(token_BL).logits_BLV
        expect(torch.isfinite(logits_BLV).all(), "a logit is not finite")
        expect(torch.equal(model(token_BL).logits_BLV, logits_BLV), "two evaluations differ")
        expect_close(model(token_BL.flip(0)).logits_BLV, logits_BLV.flip(0), "logits of permuted sequences")
        expect(
            model(token_BL[:0]).logits_BLV.shape == (0, *logits_BLV.shape[1:]), "an empty batch gives no empty logits"
        )
        if model.is_causal:
            expect_close(model(token_BL[:, :5]).logits_BLV, logits_BLV[:, :5], "logits of a prefix (later tokens leak)")
            expect_close(model(token_BL[1:2]).logits_BLV, logits_BLV[1:2], "logits of a sequence on its own")


def _check_cache(model: Decoder, token_BL: Tensor) -> None:
    if not model.is_causal:
        return
    model.eval()
    length = token_BL.shape[1]
    with torch.no_grad(), no_counting(model):
        expected_BLV = model(token_BL).logits_BLV
        for steps in ([length], [1] * length, [5, *[1] * (length - 5)], [3, 4, length - 7]):
            cache, start, parts = model.new_cache(length), 0, []
            for step in steps:
                parts.append(model(token_BL[:, start : start + step], cache=cache).logits_BLV)
                start += step
            expect_close(torch.cat(parts, dim=1), expected_BLV, f"cached logits, {steps} tokens at a time,")


def _check_paths(model: Decoder, token_BL: Tensor) -> None:
    """Blocks that are repeated and skipped, the same for all sequences or not, cached or not."""
    if not model.is_causal:
        return
    model.eval()
    last, length = len(model.blocks) - 1, token_BL.shape[1]
    once = list(range(last + 1))
    paths = [[*once, last], [0, *once], once[:-1] or once]
    with torch.no_grad(), no_counting(model):
        expect(
            torch.equal(model(token_BL, path=once).logits_BLV, model(token_BL).logits_BLV),
            "a path of each block once differs",
        )
        alone = [model(token_BL[row : row + 1], path=path).logits_BLV for row, path in enumerate(paths)]
        together = model(token_BL, path=paths).logits_BLV
        expect_close(together, torch.cat(alone), "logits of sequences with paths of their own")
        cache, parts = model.new_cache(length), []
        for first, end in ((0, 5), (5, 6), (6, length)):
            parts.append(model(token_BL[:, first:end], cache=cache, path=paths).logits_BLV)
        expect_close(torch.cat(parts, dim=1), together, "cached logits of blocks that are repeated and skipped")


def _check_padding(model: Decoder, token_BL: Tensor) -> None:
    model.eval()
    mask_BL = torch.ones_like(token_BL, dtype=torch.bool)
    mask_BL[0, :4] = mask_BL[1, :1] = False
    other_BL = torch.where(mask_BL, token_BL, (token_BL + 7) % VOCAB_SIZE)
    with torch.no_grad():
        logits_BLV = model(token_BL, token_mask_BL=mask_BL).logits_BLV
        expect(torch.isfinite(logits_BLV[mask_BL]).all(), "a logit of a padded batch is not finite")
        other_BLV = model(other_BL, token_mask_BL=mask_BL).logits_BLV
        expect_close(other_BLV[mask_BL], logits_BLV[mask_BL], "logits of a batch with other tokens in its padding")
        if model.is_causal:
            expect_close(model(token_BL[:1, 4:]).logits_BLV, logits_BLV[:1, 4:], "logits of a padded sequence")
    seen = routings_of(model, lambda: model(token_BL, token_mask_BL=mask_BL))
    for routing in seen:
        if routing.num_items == mask_BL.numel():  # what gathers its rows leaves padding out
            expect((routing.index_NK[~mask_BL.flatten()] == UNUSED).all(), "a padding token is routed")
    model.train()
    seen = routings_of(model, lambda: model(token_BL, token_mask_BL=mask_BL))
    num_passes = Counter(layer.router for layer in router_layers(model))
    for router in routers_of(model):
        routings, seen = seen[: num_passes[router]], seen[num_passes[router] :]
        load_E = sum(routing.load_E() for routing in routings)
        for part in router.balance:
            if isinstance(part, LoadCounter) and part.load_E.any():
                expect(torch.equal(part.load_E, load_E.float()), "padding is counted in a load")  # type: ignore[union-attr]


def _check_training(model: Decoder, token_BL: Tensor) -> None:
    model.train()
    output = model(token_BL, token_BL.roll(-1, 1))
    expect(torch.isfinite(output.loss), f"the loss is {output.loss}")
    parts = sum(output.auxiliary.values(), start=output.cross_entropy)
    expect_close(parts, output.loss.detach(), "the loss and the sum of its parts")
    output.loss.backward()
    check_has_gradients(model)
    empty = model(token_BL[:0], token_BL[:0])
    expect(empty.loss == 0, f"the loss of an empty batch is {empty.loss}")


def _check_recompute(model: Decoder, token_BL: Tensor) -> None:
    model.train()
    plain, plain_loads = gradients_of_training(model, token_BL), loads(model)
    model.recompute = True
    again, again_loads = gradients_of_training(model, token_BL), loads(model)
    for name, gradient in plain.items():
        expect_close(again[name], gradient, f"with recompute, the gradient of {name}")
    for load_E, again_E in zip(plain_loads, again_loads, strict=True):
        expect(torch.equal(load_E, again_E), "with recompute, a load is counted twice or not at all")


def _check_state(model: Decoder, token_BL: Tensor) -> None:
    model.train()
    gradients = gradients_of_training(model, token_BL)
    other = model.config.build(seed=1).to(token_BL.device)
    other.load_state_dict(model.state_dict())
    twins = {
        "loaded from a state dict": other,
        "deep-copied": copy.deepcopy(model),
        "pickled": pickle.loads(pickle.dumps(model)),
    }
    for how, twin in twins.items():
        expect(num_parameters(twin) == num_parameters(model), f"a model {how} has another number of parameters")
        # Gradients, not outputs: if a module that layers share had been copied apart from its owner, they would not arrive.
        for name, gradient in gradients_of_training(twin, token_BL).items():
            expect_close(gradient, gradients[name], f"in a model {how}, the gradient of {name}")


def _check_record(model: Decoder, token_BL: Tensor) -> None:
    # What decides in an evaluation may mix all destinations in training.
    model.eval()
    routers = list(find_routers(model).values())
    if not routers:
        return
    mask_BL = torch.ones_like(token_BL, dtype=torch.bool)
    mask_BL[0, :4] = False
    with torch.no_grad():
        expected_BLV = model(token_BL, token_mask_BL=mask_BL).logits_BLV
        with record_routing(model) as recorder:
            logits_BLV = model(token_BL, token_mask_BL=mask_BL).logits_BLV
    expect(torch.equal(logits_BLV, expected_BLV), "recording changes the output")
    seen = routings_of(model, lambda: model(token_BL, token_mask_BL=mask_BL), routers)
    passes = len(router_layers(model))
    expect(len(seen) == passes, f"{len(routers)} routers in {passes} passes gave {len(seen)} routings")
    trace = recorder.trace()
    expect(
        len(trace.layers) == passes, f"the trace has {len(trace.layers)} layers, the model routes in {passes} passes"
    )
    for routing in seen:
        check_routing(routing)
    real_N = mask_BL.flatten()
    rows = 0
    for routing in seen:
        places_N = routing.used_NK.sum(-1).clamp_min(1)
        # What gathers its rows leaves padding out.
        rows += int(places_N[real_N].sum() if len(places_N) == len(real_N) else places_N.sum())
    expect(trace.table.num_rows == rows, f"the trace has {trace.table.num_rows} rows for {rows} decisions")


def _check_half_precision(model: Decoder, token_BL: Tensor) -> None:
    model.train()
    target_BL = token_BL.roll(-1, 1)
    torch.manual_seed(0)
    loss = model(token_BL, target_BL).loss.detach()
    torch.manual_seed(0)
    with torch.autocast(token_BL.device.type, torch.bfloat16):
        output = model(token_BL, target_BL)
    expect(abs(output.loss - loss) < 2e-2 * loss, f"the loss is {loss}, but {output.loss} under bf16 autocast")
    output.loss.backward()
    check_has_gradients(model)
    half = copy.deepcopy(model).bfloat16()
    expect(torch.isfinite(half(token_BL, target_BL).loss), "a model cast to bf16 has no finite loss")


def _check_compile(model: Decoder, token_BL: Tensor, backend: str) -> None:
    torch.compiler.reset()
    plain, compiled = copy.deepcopy(model).train(), copy.deepcopy(model).train()
    expected = gradients_of_training(plain, token_BL)
    call = torch.compile(compiled, fullgraph=True, backend=backend)
    try:
        gradients = gradients_of_training(compiled, token_BL, call)
    except torch._dynamo.exc.TorchDynamoException as error:
        raise AssertionError(f"it does not compile into one graph: {error}") from error
    for name, gradient in gradients.items():
        expect_close(gradient, expected[name], f"compiled, the gradient of {name}")
    for load_E, compiled_E in zip(loads(plain), loads(compiled), strict=True):
        expect(torch.equal(load_E, compiled_E), "compiled, a load is not what it is in eager mode")


def _check_learning(model: Decoder, token_BL: Tensor) -> None:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    num_steps = 12
    hooks = StepHooks(model, num_steps)
    for step in range(num_steps):
        hooks.run_before(step)
        loss = model(token_BL, token_BL.roll(-1, 1)).loss
        expect(torch.isfinite(loss), f"the loss is {loss} after {step} steps")
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        hooks.run_after(step + 1)
    expect(
        losses[-1] < 0.8 * losses[0],
        f"the loss of one batch over and over goes from {losses[0]:.3f} to {losses[-1]:.3f}",
    )
