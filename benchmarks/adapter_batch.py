"""How long does a batch take whose rows have adapters of their own, against peft and grouped products, and served against the base alone?

    mixed     one forward pass, logits included, of 32 rows over 16 adapters of ranks 8 to 64 on all linear layers: ours with `load_pool`,
              against peft's own mixed batch (``adapter_names``) and against peft by swapping, adapter after adapter on its own rows.
              Logits are compared first. bars: 1.5 times peft's mixed batch, 4 times swapping
    layer     what adapters add beside one matrix, for the same rows: ours, which takes rows in any order and sorts them itself, against
              two `torch.bmm` over rows that are put in the order of their adapters, as many for each, with ranks padded by zeros to
              the greatest, and put back; eager and compiled, of which the faster counts. float32 alone. Outputs are compared first.
              no bar
    served    continuing prompts in the engine, each row with its adapter, against the same requests without adapters. That the rows say
              what they say alone is checked first. bar of all rows: 1.15 times the time of the base at most (ratio at least 0.87); how
              many bytes a step reads of adapters, as a share of the model's, says how much of the rest is memory alone

The model has the sizes of SmolLM2-135M and random numbers. In bfloat16 both sides keep adapters in bfloat16; peft may keep them in float32
too, as it does by itself, and the quicker of both counts. Forward alone, without a cache of keys and values in the rows of ``mixed``.

    python benchmarks/adapter_batch.py --json benchmarks/results/adapter_batch.amx_bf16.json  # or of what instructions yours are

peft and transformers must be installed for the rows of ``mixed``; without them these are left out, and said to be.
"""
# Shapes: B rows, L tokens, V vocabulary, E adapters, R greatest rank, C inputs, O outputs, M items of an adapter

import importlib.util
import itertools
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from _harness import arguments, compare, finish, start
from anabranch.adapters import LowRankPool, load_pool, rows_for
from anabranch.lm import Decoder, export_huggingface, load_model
from anabranch.nn import SelfAttention, SwiGLU
from anabranch.routing import Routing
from anabranch.serving import Sampling
from anabranch.serving.adapters import AdaptersConfig
from anabranch.serving.config import ServingConfig
from anabranch.serving.core.request import Output, Request
from anabranch.serving.engine.engine import Engine
from anabranch.serving.engine.messages import Add, Refused

DIM, HIDDEN, HEADS, KV_HEADS, LAYERS, VOCAB = 576, 1536, 9, 3, 30, 49152
RANKS, ADAPTERS, ROWS = (8, 16, 32, 64), 16, 32
PROMPT, TOKENS = 16, 48
SIZES = {
    "self_attn.q_proj": (DIM, DIM),
    "self_attn.k_proj": (DIM, DIM // HEADS * KV_HEADS),
    "self_attn.v_proj": (DIM, DIM // HEADS * KV_HEADS),
    "self_attn.o_proj": (DIM, DIM),
    "mlp.gate_proj": (DIM, HIDDEN),
    "mlp.up_proj": (DIM, HIDDEN),
    "mlp.down_proj": (HIDDEN, DIM),
}
FEW = ("self_attn.q_proj", "self_attn.v_proj")
# Of the greatest logit.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


def base_model(layers: int) -> Decoder:
    """Of SmolLM2-135M's sizes."""
    attention = SelfAttention.Config(num_heads=HEADS, num_kv_heads=KV_HEADS)
    config = Decoder.Config(
        vocab_size=VOCAB,
        dim=DIM,
        num_layers=layers,
        attention=attention,
        feed_forward=SwiGLU.Config(hidden_dim=HIDDEN),
        tie_embeddings=True,
        max_positions=256,
    )
    return config.build(seed=0).eval().requires_grad_(False)


def write_adapter(folder: Path, number: int, rank: int, layers: int, words: Sequence[str]) -> None:
    """A folder of peft's whose B are drawn, too, so large that logits change."""
    generator = torch.Generator().manual_seed(number)
    tensors = {}
    for layer, word in itertools.product(range(layers), words):
        inputs, outputs = SIZES[word]
        name = f"base_model.model.model.layers.{layer}.{word}"
        tensors[f"{name}.lora_A.weight"] = torch.randn(rank, inputs, generator=generator) / inputs**0.5
        tensors[f"{name}.lora_B.weight"] = torch.randn(outputs, rank, generator=generator) * 0.1
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = [word.rpartition(".")[2] for word in words]
    table = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": targets,
        "bias": "none",
        "base_model_name_or_path": None,
        "lora_dropout": 0.0,
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(table))


def write_adapters(root: Path, layers: int, words: Sequence[str], ranks: Sequence[int]) -> dict[str, Path]:
    """Folders by name."""
    folders = {f"adapter_{number}": root / str(number) for number in range(len(ranks))}
    for number, (folder, rank) in enumerate(zip(folders.values(), ranks, strict=True)):
        write_adapter(folder, number, rank, layers, words)
    return folders


def quiet(call: Callable[[], Any]) -> Callable[[], None]:
    def work() -> None:
        with torch.inference_mode():
            call()

    return work


# ---- one forward pass ----


class Theirs:
    """peft's model with all adapters."""

    def __init__(self, base: Path, folders: Mapping[str, Path], dtype: torch.dtype, *, widens: bool) -> None:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
        (first, folder), *others = folders.items()
        self.model = PeftModel.from_pretrained(model, folder, adapter_name=first, autocast_adapter_dtype=widens)
        for name, folder in others:
            self.model.load_adapter(folder, adapter_name=name, autocast_adapter_dtype=widens)
        self.model.eval()

    def mixed(self, token_BL: Tensor, rows: Sequence[str]) -> Tensor:
        """logits_BLV with an adapter for each row."""
        return self.model(input_ids=token_BL, adapter_names=list(rows), use_cache=False).logits

    def swapped(self, token_BL: Tensor, rows: Sequence[str]) -> Tensor:
        """The same, adapter after adapter."""
        logits_BLV: Tensor | None = None
        for name in dict.fromkeys(rows):
            place_M = torch.tensor([place for place, row in enumerate(rows) if row == name])
            self.model.set_adapter(name, inference_mode=True)
            own_MLV = self.model(input_ids=token_BL[place_M], use_cache=False).logits
            if logits_BLV is None:
                logits_BLV = own_MLV.new_empty(len(rows), *own_MLV.shape[1:])
            logits_BLV[place_M] = own_MLV
        assert logits_BLV is not None
        return logits_BLV


def check(case: str, ours: Tensor, theirs: Tensor, limit: float) -> None:
    error = float((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max())
    if not error <= limit:
        raise SystemExit(f"{case}: outputs differ by {error:.1e} of the greatest, more than {limit:.0e}")


def mixed_rows(root: Path, layers: int, dtype: torch.dtype, length: int, rounds: int) -> list[dict[str, Any]]:
    """Against peft, in both of its ways."""
    ranks = list(itertools.islice(itertools.cycle(RANKS), ADAPTERS))
    folders = write_adapters(root / "adapters", layers, tuple(SIZES), ranks)
    model = base_model(layers)
    export_huggingface(root / "base", model, family="llama")
    plain = load_model(root / "base")[0].to(dtype).eval()
    ours = load_pool(folders, plain, dtype=dtype).eval()
    names = list(folders)
    rows = [names[number % ADAPTERS] for number in range(ROWS)]
    token_BL = torch.randint(VOCAB, (ROWS, length), generator=torch.Generator().manual_seed(1))

    def run() -> Tensor:
        return ours(token_BL, state=rows_for(ours, rows, length)).logits_BLV

    kinds = {"": True} if dtype == torch.float32 else {", adapters in float32": True, ", adapters in bfloat16": False}
    theirs = {kind: Theirs(root / "base", folders, dtype, widens=widens) for kind, widens in kinds.items()}
    sizes = f"{ROWS} rows over {ADAPTERS} adapters, ranks {RANKS[0]} to {RANKS[-1]}, {_tokens(length)}"
    case = f"mixed, {str(dtype).removeprefix('torch.')}, {sizes}"
    with torch.inference_mode():
        found = run()
        without = ours(token_BL).logits_BLV
        if float((found - without).abs().max()) < 10 * TOLERANCE[dtype] * float(without.abs().max()):
            raise SystemExit(f"{case}: adapters change too little to be compared")
        for other in theirs.values():
            for way in (other.mixed, other.swapped):
                check(case, found, way(token_BL, rows), TOLERANCE[dtype])
    made = []
    for way in ("mixed", "swapped"):
        name = "peft adapter_names" if way == "mixed" else "peft by swapping"
        peers = {
            f"{name}{kind}": quiet(lambda other=other, way=way: getattr(other, way)(token_BL, rows))
            for kind, other in theirs.items()
        }
        made.append(compare(case, quiet(run), peers, rounds=rounds))
    return made


# ---- one layer ----


def grouped(pool: LowRankPool, row_B: Tensor) -> Callable[[Tensor], Tensor]:
    """What computes y_BLO of x_BLC by two batched products, where adapter row_B[b] is that of row b, each that of as many rows."""
    order_B = torch.argsort(row_B, stable=True)
    back_B = torch.argsort(order_B)
    scale_E = torch.tensor([float(scale) for scale in pool.scales])
    a_ECR = pool.a.detach().transpose(1, 2).contiguous()
    b_ERO = (pool.b.detach() * scale_E[:, None, None]).transpose(1, 2).contiguous()

    def run(x_BLC: Tensor) -> Tensor:
        x_EMC = x_BLC[order_B].flatten(0, 1).unflatten(0, (len(scale_E), -1))
        return torch.bmm(torch.bmm(x_EMC, a_ECR), b_ERO).flatten(0, 1).view(*x_BLC.shape[:2], -1)[back_B]

    return run


def layer_row(inputs: int, outputs: int, length: int, rounds: int) -> dict[str, Any]:
    """Ours against grouped products, of one matrix's adapters."""
    generator = torch.Generator().manual_seed(3)
    ranks = list(itertools.islice(itertools.cycle(RANKS), ADAPTERS))
    pool = LowRankPool(in_dim=inputs, out_dim=outputs, ranks=ranks, alphas=[float(rank) for rank in ranks]).eval()
    with torch.no_grad():
        pool.a.normal_(std=inputs**-0.5, generator=generator)
        pool.b.normal_(std=0.1, generator=generator)
        # Rows beyond a rank are no part of an adapter.
        for expert, rank in enumerate(ranks):
            pool.a[expert, rank:], pool.b[expert, :, rank:] = 0.0, 0.0
    row_B = torch.arange(ROWS) % ADAPTERS
    x_BLC = torch.randn(ROWS, length, inputs, generator=generator)
    items = ROWS * length
    routing = Routing(row_B.repeat_interleave(length)[:, None], torch.ones(items, 1), torch.zeros(items, ADAPTERS))

    def ours() -> Tensor:
        return pool(x_BLC.flatten(0, 1), routing).view(ROWS, length, outputs)

    sizes = f"{ROWS} rows over {ADAPTERS} adapters, ranks {RANKS[0]} to {RANKS[-1]}, {_tokens(length)}"
    case = f"layer, float32, {sizes}, {inputs} -> {outputs}"
    eager = grouped(pool, row_B)
    torch.compiler.reset()
    runs = {"grouped bmm": eager, "grouped bmm, compiled": torch.compile(eager)}
    with torch.inference_mode():
        for run in runs.values():
            check(case, ours(), run(x_BLC), 1e-5)
    peers = {name: quiet(lambda run=run: run(x_BLC)) for name, run in runs.items()}
    return compare(case, quiet(ours), peers, rounds=rounds)


def _tokens(length: int) -> str:
    return f"{length} token{'s' * (length > 1)} each"


# ---- served ----


class Served:
    """An engine and its loop. Requests end after as many tokens as were asked for."""

    def __init__(self, model: Decoder, folders: Mapping[str, Path]) -> None:
        load = tuple(f"{name}={folder}" for name, folder in folders.items())
        config = ServingConfig(
            num_blocks=ROWS * (PROMPT + TOKENS) // 8,
            max_seqs=ROWS,
            max_batched_tokens=ROWS * PROMPT,
            prefix_cache=False,
            adapters=AdaptersConfig(load=load, memory="4GiB"),
        )
        self.engine = Engine.of(model, config)
        if self.engine.runner.fast is None:
            raise SystemExit("the compiled step cannot be had here, and nothing else is measured")
        self._events: list[Any] = []
        self._loop, self._numbers = self.engine.loop(self._events.extend), itertools.count()

    def __call__(self, prompts: Sequence[Sequence[int]], rows: Sequence[str | None]) -> list[tuple[int, ...]]:
        """The tokens of each."""
        self._events.clear()
        sampling = Sampling(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
        ids = [str(next(self._numbers)) for _ in prompts]
        for id, prompt, adapter in zip(ids, prompts, rows, strict=True):
            self._loop.put(Add(Request(id=id, prompt=tuple(prompt), sampling=sampling, adapters=adapter)))
        self._loop.run(until_idle=True)
        found: dict[str, list[int]] = {id: [] for id in ids}
        for event in self._events:
            if isinstance(event, Refused):
                raise SystemExit(f"the engine refused a request: {event.error}")
            if isinstance(event, Output):
                found[event.id] += event.tokens
        return [tuple(found[id]) for id in ids]


def bytes_of(folders: Mapping[str, Path], item: int) -> int:
    """Of all numbers of the adapters, which are float32 in their files."""
    return sum((folder / "adapter_model.safetensors").stat().st_size for folder in folders.values()) // 4 * item


def served_row(
    root: Path, layers: int, dtype: torch.dtype, words: Sequence[str], ranks: Sequence[int], rows: int, rounds: int
) -> dict[str, Any]:
    """With adapters against the same without."""
    folders = write_adapters(root / "adapters", layers, words, ranks)
    model = base_model(layers).to(dtype)
    size = sum(parameter.nbytes for parameter in model.parameters())
    run = Served(model, folders)
    names = list(folders)
    told = [names[number % len(names)] for number in range(rows)]
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(VOCAB, (PROMPT,), generator=generator).tolist() for _ in range(rows)]
    of, what = (
        "1 adapter" if len(ranks) == 1 else f"{len(ranks)} adapters",
        "all layers" if len(words) > 2 else "q and v",
    )
    ends = f"rank {ranks[0]}" if len(set(ranks)) == 1 else f"ranks {min(ranks)} to {max(ranks)}"
    case = f"served, {str(dtype).removeprefix('torch.')}, {rows} row{'s' * (rows > 1)} over {of}, {ends}, {what}"
    together, plain = run(prompts, told), run(prompts, [None] * rows)
    for number in range(0, rows, 11):
        if run([prompts[number]], [told[number]]) != [together[number]]:
            raise SystemExit(f"{case}: row {number} is another than alone")
    if together == plain:
        raise SystemExit(f"{case}: adapters change no token, so nothing says that they were there")
    peers = {"the base alone": lambda: run(prompts, [None] * rows)}
    made = compare(case, lambda: run(prompts, told), peers, rounds=rounds)
    return {**made, "adapter_bytes_share": round(bytes_of(folders, dtype.itemsize) / size, 3)}


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    start(options)
    layers = 2 if options.quick else LAYERS
    has_peft = importlib.util.find_spec("peft") is not None
    if not has_peft:
        print("peft is not installed: the rows of mixed batches are left out", file=sys.stderr)
    rows: list[dict[str, Any]] = []
    mixed = list(itertools.islice(itertools.cycle(RANKS), ADAPTERS))
    for length, (inputs, outputs) in itertools.product((1, 16), sorted(set(SIZES.values()))):
        if options.only in "layer, float32":
            rows.append(layer_row(inputs, outputs, length, options.rounds))
    for dtype in (torch.float32, torch.bfloat16):
        kind = str(dtype).removeprefix("torch.")
        for length in (1, 16):
            if has_peft and options.only in f"mixed, {kind}":
                with tempfile.TemporaryDirectory() as folder:
                    rows += mixed_rows(Path(folder), layers, dtype, length, options.rounds)
        for words, ranks, number in (
            (tuple(SIZES), (16,), 1),
            (tuple(SIZES), (16,), ROWS),
            (FEW, mixed, ROWS),
            (tuple(SIZES), mixed, ROWS),
        ):
            if options.only in f"served, {kind}":
                with tempfile.TemporaryDirectory() as folder:
                    rows.append(served_row(Path(folder), layers, dtype, words, ranks, number, options.rounds))
    finish("adapter_batch", rows, options, ["torch", "anabranch", *(["peft", "transformers"] if has_peft else [])])


if __name__ == "__main__":
    main()
