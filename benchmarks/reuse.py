"""What does reusing the experts of neighbouring layers cost, against the plain model and against weights tied by hand?

The same decoder at reuse 4 ("ours") against reuse 1, and against transformers' OLMoE whose layers were made to share one
expert tensor by hand. Training is forward, backward and fresh gradients, without an optimizer. Bars: training and decode at reuse 4 at
most 1.05 times reuse 1 (ratio at least 0.95), at least 1.3 times as fast as hand-tied transformers, memory of parameters and at the
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


def memory_row(case: str, ours: Decoder, peer: Decoder) -> dict[str, Any]:
    """Bytes of parameters, as an optimizer sees them."""
    sizes = [sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20 for model in (ours, peer)]
    row = {"case": case, "ours": round(sizes[0], 3), "peer": round(sizes[1], 3), "unit": "MB", "peer_name": "reuse 1"}
    return {**row, "ratio": round(sizes[1] / sizes[0], 4), "spread": 0.0}


def peak_row(case: str, ours: Callable[[], Any], peer: Callable[[], Any]) -> dict[str, Any]:
    """The most that a pass holds at once beyond the weights: the median of five, each from fresh gradients."""
    sizes = [statistics.median(peak_megabytes(work) for _ in range(5)) for work in (ours, peer)]
    row = {"case": case, "ours": round(sizes[0], 1), "peer": round(sizes[1], 1), "unit": "MB", "peer_name": "reuse 1"}
    return {**row, "ratio": round(sizes[1] / sizes[0], 4), "spread": None}


def main() -> None:
    options = arguments(__doc__.splitlines()[0]).parse_args()
    start(options)
    token_BL = torch.randint(0, 512, (8, 256), generator=torch.Generator().manual_seed(0))
    plain, shared, growing = our_model(1), our_model(REUSE), our_model(REUSE, psr=True)
    theirs = {name: hand_tied(shared, name) for name in ("eager", "grouped_mm")}
    expected = shared(token_BL[:2]).logits_BLV
    for name, model in theirs.items():
        error = (model(token_BL[:2]).logits - expected).abs().max().item()
        if not error <= TOLERANCE:
            raise SystemExit(f"hand-tied {name}: logits differ by {error:.1e}, more than {TOLERANCE:.0e}")
    rows = []

    def add(case: str, ours: Callable[[], Any], peers: dict[str, Callable[[], Any]]) -> None:
        if options.only in case:
            rows.append(compare(case, ours, peers, rounds=options.rounds))

    def our_training(model: Decoder) -> Callable[[], None]:
        return training(model, lambda: model(token_BL, token_BL).loss)

    def their_training(model: Any) -> Callable[[], None]:
        return training(model, lambda: model(token_BL, labels=token_BL).loss)

    add("training 2048 tokens, reuse 4 against reuse 1", our_training(shared), {"reuse 1": our_training(plain)})
    add(
        "training 2048 tokens, reuse 4 with PSR against reuse 1",
        our_training(growing),
        {"reuse 1": our_training(plain)},
    )
    tied = {f"hand-tied OLMoE {name}": their_training(model) for name, model in theirs.items()}
    add("training 2048 tokens, reuse 4 against hand-tied transformers", our_training(shared), tied)
    for model in (plain, shared):
        model.zero_grad(set_to_none=True)
        model.eval()
    add("decode 1 token, reuse 4 against reuse 1", decode(shared, token_BL), {"reuse 1": decode(plain, token_BL)})
    for length in (16, 256):
        prompt_BL = token_BL[:1, :length]
        add(
            f"prefill {length} tokens, reuse 4 against reuse 1",
            forward(shared, prompt_BL),
            {"reuse 1": forward(plain, prompt_BL)},
        )
    rows.append(peak_row("peak memory of training, reuse 4 against reuse 1", our_training(shared), our_training(plain)))
    rows.append(memory_row("memory of parameters, reuse 4 against reuse 1", shared, plain))
    finish("reuse", rows, options, ("torch", "transformers", "anabranch"))


if __name__ == "__main__":
    main()
