"""What does reusing the experts of neighbouring layers cost, against the plain model and against weights tied by hand?

The same decoder at reuse 4 ("ours") against reuse 1, and against transformers' OLMoE whose layers were made to share one
expert tensor by hand, its experts eager and by grouped_mm, plain and under torch.compile, without a cache of keys and values. Training
is forward, backward and fresh gradients, without an optimizer, and so is what its peak memory is of. Bars: training and decode at reuse 4
at most 1.05 times reuse 1 (ratio at least 0.95), at least 1.3 times as fast as hand-tied transformers, memory of parameters and at the
peak of training equal within 1%. Short prefill may be slower by design: a layer then touches up to reuse times more experts.

    python benchmarks/reuse.py --json benchmarks/results/reuse.avx512_bf16.json  # or of what instructions yours are
"""
# Shapes: B sequences, L tokens

import statistics
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import _transformers as peer
from _harness import arguments, compare, finish, peak_megabytes, start
from anabranch.experts.rexmoe import ProgressiveScaling, ReXMoE
from anabranch.lm import Decoder, export_huggingface
from anabranch.nn import SelfAttention
from anabranch.routing import Router, TopK

LAYERS, DIM, EXPERTS, TOP_K, HIDDEN, REUSE = 4, 256, 16, 4, 128, 4
TOLERANCE = 1e-4  # largest difference of fp32 logits


def our_model(reuse: int, psr: bool = False) -> Decoder:
    feed_forward = ReXMoE.Config(
        num_experts=EXPERTS,
        hidden_dim=HIDDEN,
        reuse=reuse,
        psr=ProgressiveScaling.Config() if psr else None,
        router=Router.Config(select=TopK.Config(top_k=TOP_K), balance=()),
    )
    # q and k norms over the full width, as OLMoE has them
    attention = SelfAttention.Config(num_heads=4, qk_norm="full")
    return Decoder.Config(
        vocab_size=512, dim=DIM, num_layers=LAYERS, attention=attention, feed_forward=feed_forward
    ).build(seed=0)


def hand_tied(model: Decoder, implementation: str) -> nn.Module:
    """Transformers' OLMoE with our weights, every layer's experts replaced by those of the first layer of its group."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        export_huggingface(f"{folder}/model", model, family="olmoe")
        theirs = AutoModelForCausalLM.from_pretrained(
            f"{folder}/model", dtype=torch.float32, experts_implementation=implementation
        )
    layers = theirs.model.layers
    for number, layer in enumerate(layers):
        layer.mlp.experts = layers[number // REUSE * REUSE].mlp.experts
    theirs.config.use_cache = False
    return theirs.train()


def training(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    def work() -> None:
        model.zero_grad(set_to_none=True)
        loss().backward()

    return work


def forward(model: Decoder, token_BL: Tensor) -> Callable[[], None]:
    def work() -> None:
        with torch.inference_mode():
            model(token_BL, last_only=True)

    return work


def decode(model: Decoder, token_BL: Tensor) -> Callable[[], None]:
    """One more token after 64 cached ones; the cache is set back each time."""
    cache = model.new_cache(80)
    with torch.inference_mode():
        model(token_BL[:1, :64], cache=cache)

    def work() -> None:
        cache.length = 64
        with torch.inference_mode():
            model(token_BL[:1, 64:65], cache=cache)

    return work


def memory_row(case: str, ours: Decoder, plain: Decoder) -> dict[str, Any]:
    """Bytes of parameters, as an optimizer sees them."""
    sizes = [sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20 for model in (ours, plain)]
    row = {"case": case, "ours": round(sizes[0], 3), "peer": round(sizes[1], 3), "unit": "MB", "peer_name": "reuse 1"}
    return {**row, "ratio": round(sizes[1] / sizes[0], 4), "spread": 0.0}


def peak_row(case: str, ours: Decoder, plain: Decoder, token_BL: Tensor) -> dict[str, Any]:
    """The most that a step of training holds at once beyond the weights, its gradients among it: the median of five."""
    sizes = [statistics.median(peak_of_training(model, token_BL) for _ in range(5)) for model in (ours, plain)]
    row = {"case": case, "ours": round(sizes[0], 1), "peer": round(sizes[1], 1), "unit": "MB", "peer_name": "reuse 1"}
    return {**row, "ratio": round(sizes[1] / sizes[0], 4), "spread": None}


def peak_of_training(model: Decoder, token_BL: Tensor) -> float:
    """MB of one step whose gradients are not there before."""
    work = training(model.train(), lambda: model(token_BL, token_BL).loss)
    work()
    model.zero_grad(set_to_none=True)
    found = peak_megabytes(work)
    model.zero_grad(set_to_none=True)
    return found


def check(name: str, model: Any, call: Any, token_BL: Tensor, expected_BLV: Tensor) -> None:
    """That ``call``, a hand-tied model or its compiled form, computes what ours does, in float32."""
    error = (call(token_BL).logits - expected_BLV).abs().max().item()
    if not error <= TOLERANCE:
        raise SystemExit(f"{name}: logits differ by {error:.1e}, more than {TOLERANCE:.0e}")
    peer.check_products(name, lambda: call(token_BL, labels=token_BL).loss.backward(), "float32")
    model.zero_grad(set_to_none=True)


def hand_tied_peers(model: Decoder, token_BL: Tensor) -> dict[str, Callable[[], None]]:
    """A step of training of each form of transformers' model with our weights."""
    peer.forget_compiled()
    theirs: dict[str, Any] = {kind: hand_tied(model, kind) for kind in ("eager", "grouped_mm")}
    calls = {f"hand-tied OLMoE {kind}": (tied, tied) for kind, tied in theirs.items()}
    for kind, tied in theirs.items():
        calls[f"hand-tied OLMoE {kind}, compiled"] = (tied, peer.compiled(tied, kind))
    with torch.no_grad():
        expected_BLV = model(token_BL).logits_BLV
    for name, (tied, call) in calls.items():
        check(name, tied, call, token_BL, expected_BLV)

    def step(tied: Any, call: Any) -> Callable[[], None]:
        return training(tied, lambda: call(token_BL, labels=token_BL).loss)

    return {name: step(tied, call) for name, (tied, call) in calls.items()}


def main() -> None:
    options = arguments(__doc__.splitlines()[0]).parse_args()
    start(options)
    token_BL = torch.randint(0, 512, (8, 256), generator=torch.Generator().manual_seed(0))
    plain, shared, growing = our_model(1), our_model(REUSE), our_model(REUSE, psr=True)
    rows: list[dict[str, Any]] = []

    def add(case: str, ours: Callable[[], Any], peers: dict[str, Callable[[], Any]]) -> None:
        if options.only in case:
            rows.append(compare(case, ours, peers, rounds=options.rounds))

    def our_training(model: Decoder) -> Callable[[], None]:
        return training(model, lambda: model(token_BL, token_BL).loss)

    for case, model in (("reuse 4", shared), ("reuse 4 with PSR", growing)):
        case = f"training 2048 tokens, {case} against reuse 1"
        add(case, our_training(model), {"reuse 1": our_training(plain)})
    case = "training 2048 tokens, reuse 4 against hand-tied transformers"
    if options.only in case:
        add(case, our_training(shared), hand_tied_peers(shared, token_BL))
    rows.append(peak_row("peak memory of training, reuse 4 against reuse 1", shared, plain, token_BL))
    for model in (plain, shared):
        model.zero_grad(set_to_none=True)
        model.eval()
    add("decode 1 token, reuse 4 against reuse 1", decode(shared, token_BL), {"reuse 1": decode(plain, token_BL)})
    for length in (16, 256):
        prompt_BL = token_BL[:1, :length]
        case = f"prefill {length} tokens, reuse 4 against reuse 1"
        add(case, forward(shared, prompt_BL), {"reuse 1": forward(plain, prompt_BL)})
    rows.append(memory_row("memory of parameters, reuse 4 against reuse 1", shared, plain))
    finish("reuse", rows, options, ("torch", "transformers", "anabranch"))


if __name__ == "__main__":
    main()
