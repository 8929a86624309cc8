"""How fast is a whole training step, from batch to moved weights, against the same model in transformers?

Ours is one step of `anabranch.train.Trainer`; the peer is OLMoE (64 experts) or Mixtral (8) with its experts eager, by grouped_mm
and, where its copies of weights fit (`_transformers.MOST_COPIED`), by batched_mm, the first two also under torch.compile, trained by the
loop one writes for it: forward, backward, clipping, fused AdamW. Same weights, batch, AdamW settings and autocast; losses and gradients
are compared first. In bfloat16 the peer's matrix products are in bfloat16, its experts' too (`_transformers.cast_grouped_mm`): they are
counted, in ``peer_products``, and any of another type ends the benchmark. No balance losses on either side, since the two define them
differently. Bar: 1.5.

    python benchmarks/train_lm.py --json benchmarks/results/train_lm.avx512_bf16.json  # or of what instructions yours are
"""
# Shapes: B sequences, L positions, D width

import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import _transformers as peer
from _harness import arguments, compare, finish, start
from anabranch.data import Batch, DataConfig, Files
from anabranch.lm import Decoder, load_model
from anabranch.train import Constant, RunConfig, TrainConfig, Trainer


class Case(NamedTuple):
    dim: int
    layers: int
    experts: int
    top_k: int
    hidden: int
    batch: int
    length: int
    vocab: int = 257

    def __str__(self) -> str:
        name = f"d={self.dim} layers={self.layers} E={self.experts} K={self.top_k} h={self.hidden} batch={self.batch}x{self.length}"
        return name if self.vocab == 257 else f"{name} V={self.vocab}"


CASES = [
    Case(256, 4, 64, 8, 128, 8, 256),
    Case(256, 4, 8, 2, 512, 8, 256),
    Case(128, 4, 8, 2, 128, 8, 256),
    Case(256, 4, 64, 8, 128, 8, 256, vocab=8192),
]
ADAMW = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8}
DECAY, CLIP = 0.1, 1.0
# Relative error of the loss and of the gradient as a whole. In bf16 a few tokens near a tie go to another expert.
TOLERANCE = {"float32": (1e-5, 1e-3), "bfloat16": (5e-3, 0.25)}


def their_model(case: Case, implementation: str) -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM, OlmoeConfig, OlmoeForCausalLM

    common: dict[str, Any] = {
        "vocab_size": case.vocab,
        "hidden_size": case.dim,
        "intermediate_size": case.hidden,
        "num_hidden_layers": case.layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "num_experts_per_tok": case.top_k,
        "max_position_embeddings": 2048,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
        "use_cache": False,
        "attn_implementation": "sdpa",
    }
    torch.manual_seed(0)
    if case.experts == 8:
        model = MixtralForCausalLM(MixtralConfig(num_local_experts=case.experts, sliding_window=None, **common))
    else:
        model = OlmoeForCausalLM(OlmoeConfig(num_experts=case.experts, **common))
    model.set_experts_implementation(implementation)
    return model.train()


def our_model(theirs: Any) -> Decoder:
    """The same weights, read by our importer; the balance losses that their config asks for are left out."""
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        model, _ = load_model(folder)
    layer = model.config.feed_forward
    plain = model.config.replace(feed_forward=layer.replace(router=layer.router.replace(balance=())))
    bare = Decoder(plain)
    bare.load_state_dict(model.state_dict())
    return bare


class OneBatch:
    """A stream that gives the same batch again and again."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def next_batch(self, batch_size: int) -> Batch:
        return self.batch


def our_trainer(case: Case, model: Decoder, batch: Batch, precision: str, folder: Path) -> Trainer:
    text = folder / "text.txt"
    text.write_text("a corpus that is never read " * 200)
    config = RunConfig(
        model=model.config,
        data=DataConfig(corpus=Files.Config(paths=(str(text),)), sequence_length=case.length),
        train=TrainConfig(
            steps=10**6,
            batch_size=case.batch,
            learning_rate=ADAMW["lr"],
            schedule=Constant.Config(warmup=0),
            weight_decay=DECAY,
            embedding_weight_decay=True,
            clip=CLIP,
            precision=precision,
        ),
    )
    trainer = Trainer(config, folder / "run", model=model)
    trainer.stream = OneBatch(batch)  # type: ignore[assignment]
    return trainer


def autocast(precision: str, device: torch.device) -> Any:
    return torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext()


def their_loss(model: Any, batch: Batch, precision: str) -> Tensor:
    with autocast(precision, batch.token_BL.device):
        return model(input_ids=batch.token_BL, labels=batch.target_BL, shift_labels=batch.target_BL).loss


def their_step(model: Any, batch: Batch, precision: str, call: Any) -> Callable[[], Any]:
    """``call``: what runs the model: itself, or its compiled form."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, fused=True, **ADAMW)

    def work() -> None:
        their_loss(call, batch, precision).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        assert torch.isfinite(norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return work


def gradient(model: Any) -> Tensor:
    """Gradients of the parts whose layout is the same on both sides."""
    if isinstance(model, Decoder):
        parts = [model.embedding.weight, model.norm.weight, model.head.weight]  # type: ignore[union-attr]
        for block in model.blocks:
            routed: Any = block.feed_forward
            parts += [block.attention.out.weight, routed.router.score.weight, routed.experts.w13, routed.experts.w2]
    else:
        parts = [model.model.embed_tokens.weight, model.model.norm.weight, model.lm_head.weight]
        for layer in model.model.layers:
            routed = layer.mlp
            parts += [layer.self_attn.o_proj.weight, routed.gate.weight]
            parts += [routed.experts.gate_up_proj, routed.experts.down_proj]
    flat = torch.cat([part.grad.float().flatten() for part in parts])
    model.zero_grad(set_to_none=True)
    return flat


def check(name: str, trainer: Trainer, theirs: Any, call: Any, batch: Batch, precision: str) -> dict[str, int]:
    """That ``call``, ``theirs`` or its compiled form, computes what ours does, and in which precision: its products, counted."""
    with autocast(precision, batch.token_BL.device):
        loss = trainer.model(batch.token_BL, batch.target_BL).loss
    loss.backward()
    their = their_loss(call, batch, precision)
    their.backward()
    mine, other = gradient(trainer.model), gradient(theirs)
    errors = abs(loss.item() / their.item() - 1), ((mine - other).norm() / other.norm()).item()
    for what, error, allowed in zip(("loss", "gradient"), errors, TOLERANCE[precision], strict=True):
        if not error <= allowed:
            raise SystemExit(f"{name}: the {what} differs by {error:.1e}, more than {allowed:.0e}")
    counted = peer.check_products(name, lambda: their_loss(call, batch, precision).backward(), precision)
    theirs.zero_grad(set_to_none=True)
    return counted


def time_case(case: Case, precision: str, rounds: int) -> dict[str, Any]:
    """The row of one case."""
    name = f"{case} {precision}"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peer.forget_compiled()
    kinds = peer.implementations(case.batch * case.length * case.top_k, case.dim, case.hidden, case.layers)
    theirs = {kind: their_model(case, kind).to(device) for kind in kinds}
    generator = torch.Generator().manual_seed(1)
    sequence_BL = torch.randint(case.vocab, (case.batch, case.length + 1), generator=generator)
    whole = torch.zeros(case.batch, dtype=torch.int64)
    batch = Batch(sequence_BL[:, :-1].contiguous(), sequence_BL[:, 1:].contiguous(), whole).to(device)
    family = "Mixtral" if case.experts == 8 else "OLMoE"
    calls = {f"{family} {peer.label(kind)}": (model, model) for kind, model in theirs.items()}
    for kind in ("eager", peer.CAST):
        calls[f"{family} {peer.label(kind)}, compiled"] = (theirs[kind], peer.compiled(theirs[kind], kind))
    with tempfile.TemporaryDirectory() as folder:
        trainer = our_trainer(case, our_model(theirs["eager"]), batch, precision, Path(folder))
        products = {
            each: check(f"{name}, {each}", trainer, model, call, batch, precision)
            for each, (model, call) in calls.items()
        }
        peers = {each: their_step(model, batch, precision, call) for each, (model, call) in calls.items()}
        row = compare(name, trainer._step, peers, rounds=rounds)
        trainer.close()
    tokens = round(1e3 * case.batch * case.length / row["ours"])
    counted = products[row["peer_name"]]
    return {**row, "tokens_per_second": tokens, "peer_products": counted, "shape": case._asdict()}


def main() -> None:
    options = arguments(__doc__.splitlines()[0]).parse_args()
    start(options)
    peer.register()
    rows = [
        time_case(case, precision, options.rounds)
        for case in CASES
        for precision in ("float32", "bfloat16")
        if options.only in f"{case} {precision}" and not (options.quick and case.vocab > 257)
    ]
    finish("train_lm", rows, options, ("torch", "transformers", "anabranch"))


if __name__ == "__main__":
    main()
